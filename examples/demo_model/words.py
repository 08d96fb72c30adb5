"""Word lists, facts and sentence patterns from which the demo model's text is built.

Patterns use two notations: ``[a|b|c]`` stands for one of the alternatives, which may be nested
or empty, and ``{name}`` for a value that the generator fills in.
"""

# ruff: noqa: E501, SIM905

GIRLS = (
    "Lily Mia Anna Emma Rosa Ella Nora Ruby Zoe Clara Lucy Molly Grace Ivy Daisy Hanna Maya Sara "
    "Alice Penny Luna Poppy Wendy Tina Olive Hazel Freya Greta Kira Juno"
).split()
BOYS = (
    "Tom Ben Max Leo Sam Jack Finn Otto Hugo Paul Noah Oscar Tim Felix Milo Theo Peter Adam Charlie "
    "Bruno Ollie Toby Jasper Nico Henry Arlo Emil Ravi Kofi Pip"
).split()

KINDS = (
    "fox rabbit bear mouse cat dog owl frog duck hedgehog squirrel turtle lion tiger elephant "
    "monkey penguin whale bee butterfly snail horse cow pig sheep goat donkey chicken deer wolf "
    "mole otter beaver badger parrot crow swan goose kitten puppy pony lamb bunny fish crab seal "
    "dolphin octopus spider ant ladybird bat camel giraffe zebra kangaroo koala panda dragon robot "
    "fairy wizard witch giant king queen prince princess knight pirate sailor farmer baker gardener "
    "painter dinosaur unicorn mermaid ghost snowman monster cloud star train boat toy doll astronaut "
    "alien teacher doctor explorer troll elf lizard snake raccoon moose eagle"
).split()
FEMALE_KINDS = {"queen", "princess", "witch", "mermaid", "fairy", "doll"}
MALE_KINDS = {"king", "prince", "wizard", "snowman", "giant"}
SIZES = [
    "little",
    "small",
    "tiny",
    "young",
    "big",
    "old",
    "brave",
    "shy",
    "curious",
    "kind",
    "clever",
    "friendly",
    "quiet",
    "funny",
    "sleepy",
    "lonely",
    "happy",
]

HOMES = [
    ("in", "a small village by the sea"),
    ("in", "a little house near the forest"),
    ("in", "a deep green forest"),
    ("on", "a quiet farm"),
    ("on", "a high mountain"),
    ("in", "a big city"),
    ("in", "a tall tower"),
    ("in", "a cozy cave"),
    ("in", "a warm valley"),
    ("on", "a small island"),
    ("under", "an old oak tree"),
    ("by", "a clear blue lake"),
    ("near", "a wide river"),
    ("in", "a castle on a hill"),
    ("in", "a garden full of flowers"),
    ("at", "the edge of the woods"),
    ("behind", "an old mill"),
    ("in", "a tree house"),
    ("on", "a boat with white sails"),
    ("in", "a land far away"),
]
PLACES = [
    "the forest",
    "the river",
    "the lake",
    "the hill",
    "the meadow",
    "the market",
    "the beach",
    "the garden",
    "the old bridge",
    "the village",
    "the mountain",
    "the park",
    "the pond",
    "the mill",
    "the castle",
    "the field",
    "the orchard",
    "the cave",
    "the harbour",
    "the library",
    "the school",
    "the woods",
    "the valley",
    "the island",
]
COLOURS = ["red", "blue", "green", "yellow", "white", "brown", "orange", "purple", "pink", "golden", "silver"]
THINGS = [
    "ball",
    "hat",
    "kite",
    "book",
    "key",
    "bell",
    "lamp",
    "drum",
    "scarf",
    "boat",
    "box",
    "map",
    "button",
    "ring",
    "basket",
    "umbrella",
    "flute",
    "cup",
    "shell",
    "stone",
    "feather",
    "coin",
    "wagon",
    "blanket",
    "bag",
    "clock",
    "whistle",
    "lantern",
    "balloon",
    "ribbon",
]
FOODS = [
    "apple pie",
    "honey cake",
    "warm bread",
    "vegetable soup",
    "berry jam",
    "pancakes",
    "cookies",
    "cheese",
    "cherries",
    "apples",
    "carrots",
    "strawberries",
    "plums",
    "nuts",
]
SKILLS = [
    "swim",
    "sing",
    "dance",
    "paint",
    "read",
    "whistle",
    "climb",
    "bake",
    "skate",
    "juggle",
    "play the drum",
    "play the flute",
    "fly a kite",
    "ride a bike",
    "count the stars",
    "tell stories",
]
HOBBIES = [
    "explore",
    "play in the sun",
    "look at the stars",
    "read books",
    "sing songs",
    "collect shells",
    "build small houses",
    "help others",
    "pick flowers",
    "watch the clouds",
    "draw pictures",
    "run in the grass",
    "listen to stories",
    "eat berries",
    "jump in puddles",
    "ask questions",
]
TRAITS = [
    "brave",
    "kind",
    "curious",
    "clever",
    "gentle",
    "cheerful",
    "careful",
    "shy",
    "quiet",
    "playful",
    "patient",
    "helpful",
    "polite",
    "funny",
]
WEATHER = ["sunny", "windy", "rainy", "snowy", "cold", "warm", "bright", "foggy", "quiet", "cloudy"]
FEARS = ["the dark", "thunder", "deep water", "high places", "loud noises", "big dogs", "the wind"]
MORALS = [
    "A good friend is worth more than gold.",
    "It is good to share.",
    "Small steps can lead far.",
    "It is never too late to say sorry.",
    "Being kind costs nothing.",
    "Even the smallest one can help.",
    "Being brave means trying even when you are afraid.",
    "Asking for help is not a weakness.",
    "Patience makes hard things easy.",
    "Things are more fun when you do them together.",
    "Telling the truth is always best.",
]

OPENINGS = [
    "Once upon a time[,|] there was {intro}. {He} lived {home}.",
    "Once upon a time[,|] there was {intro} who lived {home}.",
    "Once upon a time[,|] {intro} lived {home}.",
    "There once was {intro} who lived {home}.",
    "Long ago, {intro} lived {home}.",
    "Long, long ago, there was {intro}. {He} lived {home}.",
    "Once there was {intro}. {His} home was {home}.",
    "{home}, there lived {intro}.",
    "{home} lived {intro}.",
    "{the_hero} lived {home}.[ {His} name was {name}.|]",
    "{the_hero} [woke up early|looked out of the window|was very happy that day].[ {His} name was {name}.|] {He} lived {home}.",
    "{name} was {a_hero}. {He} lived {home}.",
    "{name} the {kind} lived {home}.",
    "This is a story about {intro}. {He} lived {home}.",
    "One {weather} [day|morning|evening], {intro} [sat by the window|went for a walk|was looking at the sky]. {He} lived {home}.",
    "It was a {weather} [day|morning|evening]. {intro} [sat by the window|went for a walk|was looking at the sky].",
    "Every [morning|day], {the_hero} [walked to {place}|looked at the sky and smiled|said hello to the sun].[ {His} name was {name}.|]",
    '"My name is {name}," said {the_hero}. {He} lived {home}.',
]
MIDDLES = [
    "{He} was [very|always|] {trait} and loved to {hobby}.",
    "{He} loved to {hobby}.",
    "Every day {he} liked to {hobby}.",
    "{He} was {trait}, and everyone liked {him}.",
    "More than anything, {he} loved to {hobby}.",
    "{He} had [many friends|a warm bed, a small garden and a {colour} {thing}|only one wish|a {colour} {thing} that {he} loved].",
    "",
]
ENDINGS = [
    "From that day on, {hero} and {friend} were [best |good |]friends.",
    "And they lived happily ever after.",
    "{hero} went home [with a smile|happy and tired|under the stars], and that night {he} slept very well.",
    "That night, {hero} looked at the stars and [smiled|was happy|said thank you|fell asleep].",
    "{hero} never forgot that day.",
    "And if you walk to {place} [today|in the evening|on a {weather} day], you may still see them [there|playing|laughing] together.",
    "Everyone [cheered|laughed and danced|was happy], and they [ate {food2} together|sang until the moon came up].",
    "The end of the day was warm and quiet, and {hero} was [glad|happy|proud].",
]

PLOTS: dict[str, list[str]] = {
    "lost": [
        "One [{weather} |]day, {hero} could not find {his} {colour} {thing}. | One {weather} morning, {hero} saw that {his} {colour} {thing} was gone.",
        '[{He} looked under the bed and behind the door, but it was not there.|{He} looked everywhere, but the {thing} was gone.|"Where is my {thing}?" {he} asked.]',
        "[So {he} walked to {place} to look for it.|{He} went to {place} and looked [under every leaf|behind every stone|in the tall grass].]",
        'There {he} met {a_friend}[ named {fname}|]. ["Why are you so sad?" asked {friend}.|"Can I help you?" asked {friend}.]',
        '"I lost my {colour} {thing}," said {hero}. ["Let us look for it together," said {friend}.|"Do not worry. I will help you," said {friend}.]',
        "[They looked and looked.|They searched all [day|morning].|] [At last, they saw something {colour} [in a tree|near {place2}|under a bush|in the water].|Then {friend} saw something {colour} [in a tree|near {place2}|under a bush|in the water].] It was the {thing}!",
        '"Thank you!" said {hero}[ and hugged {friend}|]. [Then they shared some {food}.|They played with the {thing} until the sun went down.|]',
    ],
    "friend": [
        "But {hero} [was lonely|had no one to play with|wished for a friend].",
        "One {weather} [day|morning|afternoon], {he} went to {place}. [There {he} met|There {he} saw|Under a tree sat] {a_friend}[ named {fname}|].",
        '["Hello," said {hero}. "Do you want to play with me?"|"Hello! My name is {hero_name}," said {hero}. "Who are you?"|"Who are you?" asked {hero}.]',
        '[{friend} was shy at first, but then {fhe} smiled.|"I am new here," said {friend}, "and I have no friends yet."|"I would like that," said {friend}.]',
        "[They played with a {colour} {thing} all day.|They ran to {place2} and [played in the grass|looked at the clouds|told each other stories].|They shared some {food} and laughed a lot.]",
        'When the sun went down, {friend} [said, "Will you come back tomorrow?"|asked, "Are we friends now?"] "[Yes|Of course]," said {hero}.',
    ],
    "learn": [
        "{hero} wanted to learn to {skill}. | {hero} had one big wish. {He} wanted to {skill}.",
        '[{He} tried and tried, but it was too hard.|The first time {he} tried, it did not work at all.|But every time {he} tried, something went wrong.] [{hero} was sad.|"I will never learn it," {he} said.|]',
        'One [{weather} |]day, {a_friend}[ named {fname}|] came to {place} and saw {him}. ["I can show you," said {friend}.|"Do not give up," said {friend}. "I will help you."]',
        '[Every morning they met at {place2}.|So they practised every day.] ["Slowly," said {friend}. "One step at a time."|{friend} was very patient.|]',
        'After [a week|many days|three days], {hero} could {skill}[ all by {himself}|]! ["I can do it!" {he} shouted.|{He} was so happy that {he} jumped in the air.|{friend} clapped and laughed.]',
    ],
    "rescue": [
        'One {weather} [day|evening], {hero} heard a small voice near {place}. "Help! Please help me!"',
        "It was {a_friend}[ named {fname}|] who was stuck [in the mud|in a deep hole|in a tall tree|under a branch|between two rocks].",
        '[{hero} was a little afraid, but {he} did not run away.|"Do not be afraid," said {hero}. "I am here."|{hero} thought for a moment.]',
        "[{He} found a long rope and pulled as hard as {he} could.|{He} ran home and came back with a long rope.|{He} called all {his} friends, and they pulled together.] [At last|Then], {friend} was free.",
        '"Thank you," said {friend}. "You are very [brave|kind]." [They walked home together and ate {food}.|{friend} gave {hero} a {colour} {thing}.|]',
    ],
    "treasure": [
        "One day, {hero} found an old map [in a box|under the bed|in a book|in a bottle]. It showed the way to {place}.",
        '"[Maybe there is a treasure|There must be something special there]," {he} thought. {He} [packed some {food}|took {his} {colour} {thing}] and [went on {his} way|asked {a_friend} to come along].',
        "The way was long. [{He} walked over the hill and past {place2}.|It began to rain, but {he} did not turn back.|The path went up and down, and the wind was strong.]",
        'At {place}, {hero} found a small box under a stone. ["What is inside?" {he} wondered.|{He} opened it very slowly.]',
        'Inside was [a {colour2} {thing2}|a {colour2} {thing2} and a letter]. [The letter said, "The best treasure is the one you share."|It was [old|small] and beautiful.]',
        "So {hero} went home and [shared {food} with all {his} friends|showed it to {friend}|gave it to {friend}].",
    ],
    "fear": [
        "But {hero} was afraid of {fear}.",
        "One [night|evening], {he} could not sleep. [There was a strange sound outside.|The wind was strong and the night was very dark.] {hero} hid under {his} blanket.",
        'Then {he} heard a soft voice. It was {a_friend}[ named {fname}|]. ["Are you afraid too?" asked {friend}.|"I am here with you," said {friend}.]',
        "[They held hands and looked outside.|{friend} lit a small lantern, and the room was full of warm light.|They told each other stories until it was quiet.]",
        '[The strange sound was only a branch at the window.|It was only the wind in the trees.|Soon they both had to laugh.] "[That was not so bad|It is easier when we are together]," said {hero}.',
        "After that, {hero} was [not afraid of {fear} any more|much braver].",
    ],
    "gift": [
        "[{He} had a very good friend, {a_friend}[ named {fname}|]|{His} best friend was {a_friend}[ named {fname}|]]. Tomorrow was the birthday of {friend}.",
        '{hero} wanted to [make|give] {fhim} something special. ["What does {friend} like best?" {he} thought.|But {he} had no money at all.]',
        "First {he} [made|wanted to make] {food}, but [everything fell on the floor|it was burnt]. Then {he} [painted a picture|wrote a song], but [the rain washed it away|the wind took it away].",
        "At last {he} had an idea. {He} went to {place} and [found a {colour} {thing}|made a {colour} {thing} with {his} own hands].",
        'In the morning, {hero} went to {friend}. "Happy birthday!" {he} said. [{friend} smiled from ear to ear.|"This is the best gift of all," said {friend}.]',
    ],
    "garden": [
        "One day in spring, {hero} found a small seed near {place}. {He} put it into the ground and gave it water.",
        '[Every day {he} looked at it, but nothing happened.|One day went by, then two, then three, but nothing happened.] ["Maybe it is asleep," said {hero}.|{hero} was sad.]',
        '"You have to wait," said {a_friend} who came by. "Good things need time."',
        "So {hero} waited. [The rain fell and the sun came out again.|{He} sang a song for the seed every evening.|The days became warm and long.]",
        "Then one {weather} morning, there was a small green leaf! [Soon it was a tall plant with {colour} flowers.|It grew and grew until it was as tall as the house.|In summer it was full of {colour} flowers.]",
        "{hero} and {friend} [sat under it and ate {food}|danced around it].",
    ],
    "machine": [
        "One day, the big [clock|lamp|bell|machine] in the village stopped. [Nobody knew why.|Everyone was worried.]",
        '"I will find out what is wrong," said {hero}. {He} took {his} {colour} {thing} and [climbed up the stairs|went inside|opened the little door].',
        "It was dark in there, and there were many wheels. [Between two of them sat {a_friend}.|Behind the biggest wheel slept {a_friend}.]",
        '"[I am sorry|Oh no]," said {friend}. "[I only wanted a warm place to sleep|I was looking for a place to live|I got lost and could not get out]."',
        '["That is all right," said {hero}. "You can stay with me."|{hero} was not angry. "Come with me," {he} said. "I know a better place."] {He} turned the wheels, and it worked again.',
    ],
    "race": [
        "One {weather} day, there was a big race [from {place} to {place2}|around {place}]. {hero} wanted to win. | Every year there was a big race [from {place} to {place2}|around {place}]. This time {hero} wanted to win.",
        '"I am faster than you," said {a_friend}[ named {fname}|]. ["We will see," said {hero}.|{hero} only smiled.]',
        "They ran [as fast as the wind|past the trees and over the bridge]. First {hero} was ahead, then {friend}.",
        'But suddenly {friend} fell down and hurt {fhis} [foot|leg]. {hero} [stopped at once|turned around|did not think twice]. "[Come, I will help you|Hold on to me]," {he} said.',
        "They walked [slowly |]to the end together. [They were the last ones, but everyone clapped for them.|Nobody asked who had won.]",
    ],
    "star": [
        "One night, {hero} saw a small star fall from the sky. It fell near {place}.",
        '{He} [ran|walked] there as fast as {he} could. The star was [cold and afraid|very small and its light was weak]. "I want to go home," it said.',
        '{hero} [put the star into {his} {colour} {thing}|held the star in {his} hands] and [asked {a_friend} for help|went to {a_friend} who knew the sky]. "[We must go to the highest place|Only the wind can help]," said {friend}.',
        'So they climbed [up the mountain|to the top of the tallest tree]. ["Ready?" asked {hero}.|The wind was strong and the air was clear.] [They threw the star up high, and it flew|The wind took the star and carried it] back into the sky.',
        "Now one star [is brighter than the others|shines a little brighter every night]. [{hero} waves at it every evening.|It is saying thank you.]",
    ],
    "share": [
        "One day, {hero} [made|bought|found] a big basket of {food}. It smelled very good.",
        '"I will eat it all by myself," {he} thought. {He} sat down [near {place}|under a tree].',
        'Then {a_friend}[ named {fname}|] came by. "I am so hungry," said {friend}. ["I have not eaten all day."|"May I have a little?"]',
        '{hero} looked at the basket. [There was not much|It was hard to give something away], but {he} said, "[Sit down with me. We can share.|Here, take half of it.]"',
        "[They ate together and told each other stories.|Never before had {food} tasted so good.] [The next day, {friend} came back with a {colour} {thing} for {hero}.|The next day, {friend} brought {hero} a {colour} {thing}.|]",
    ],
    "trip": [
        "One {weather} morning, {hero} wanted to see {place}. {He} had never been there before.",
        "{He} packed some {food} and {his} {colour} {thing}, and off {he} went. [The birds were singing.|The sun was warm.|The road was long.]",
        'On the way {he} met {a_friend}[ named {fname}|]. "Where are you going?" asked {friend}. "To {place}! Do you want to come with me?" [asked|said] {hero}.',
        "So they went on together. [They crossed a river and climbed a hill.|They sang a song about the {colour} sky.|They got lost two times, but they did not mind.]",
        'In the evening they came to {place}. [It was even more beautiful than {hero} had thought.|"Look at that!" said {hero}.|The water was golden in the last light of the day.]',
        'They [sat down|made a small fire] and ate {food}. ["Where shall we go tomorrow?" asked {friend}.|"This was a good day," said {hero}.]',
    ],
    "letter": [
        "One {weather} morning, {hero} found a letter at the door. But it was not for {him}. It was for {a_friend} who lived near {place}.",
        '"[Someone must be waiting for this letter|This may be important]," {he} thought. So {he} took {his} {colour} {thing2} and [went on {his} way|walked and walked].',
        "[The wind tried to take the letter, but {hero} held it tight.|It began to rain, but {he} kept the letter dry.|{He} had to cross a river and climb a hill.]",
        'At last {he} knocked at the door. "A letter for you!" [{he} said|said {hero}]. {friend} [opened it with shaking hands|read it and began to smile]. ["It is from my sister," said {friend}. "She is coming home!"|"It is from an old friend," said {friend}. "I have waited so long!"]',
        '"Thank you. You [came such a long way|are very kind]," said {friend}. [They drank tea and ate {food}.|{friend} gave {hero} a {colour2} {thing} for the way home.]',
    ],
    "music": [
        "One evening, {hero} heard [beautiful|strange|soft] music from {place}. [Who could that be?|{He} had never heard anything like it.]",
        "{He} followed the sound [over the hill|through the tall grass|along the path]. There sat {a_friend}[ named {fname}|] and played [the flute|the drum|a small guitar].",
        '"[Please do not stop|That is so beautiful]," said {hero}. "Can I play with you?" "[Of course|I was hoping that someone would ask]," said {friend}.',
        "[So {hero} sang, and {friend} played.|{hero} found two sticks and an old pot and made a drum.] [Soon more animals came to listen.|The birds sang with them.|Even the moon seemed to listen.]",
        "[From then on, there was music at {place} every evening.|They played until the stars came out.]",
    ],
    "bridge": [
        "Between the house of {hero} and {place} there was a wide river. On the other side lived {a_friend}[ named {fname}|].",
        'Every day they waved at each other, but [the water was too deep|there was no bridge]. "[I wish we could play together|Come over to me]!" said {friend}.',
        '{hero} had an idea. "Let us build a bridge!" {he} said. [{He} brought wood, and {friend} brought stones.|They both began to work, one from each side.]',
        "It [took three days|took a whole week|was hard work]. [Once the river took half of it away, but they did not give up.|Many others came to help.] [Then the last stone was in its place.|Then the bridge was ready.]",
        'They met in the middle and [laughed|shared some {food}|hugged each other]. "[Now we can play every day|Together we can do anything]," said {hero}.',
    ],
    "wish": [
        'One night, {hero} found an old [lamp|bottle|shell] near {place}. {He} cleaned it, and a small voice said, "You have one wish."',
        '{hero} thought for a long time. "[Should I wish for gold|Do I want to be strong|Do I want a big castle]? [No, I have all that I need|No, that would not make me happy]."',
        "Then {he} saw {a_friend}[ named {fname}|] who [was cold and hungry|sat alone under a tree|was looking for a home].",
        '"I wish that {friend} [is happy|has a warm home|has enough to eat]," said {hero}. "[A good wish|That is the best wish I ever heard]," said the voice, and it [came true|was done].',
        '{friend} [looked up and smiled|could not believe it]. "How can I thank you?" asked {friend}. ["Just be my friend," said {hero}.|"You do not have to," said {hero}.]',
    ],
    "storm": [
        "One evening, dark clouds came over {place}. Soon there was [thunder and rain|a big storm|snow everywhere].",
        "{hero} [was warm and dry at home|sat by the fire with some {food}]. Then someone knocked at the door. [Knock, knock, knock!|Who could that be?]",
        'Outside stood {a_friend}[ named {fname}|], wet and cold. ["May I come in?" asked {friend}.|"My home is gone," said {friend}.|"I cannot find my way home," said {friend}.]',
        '"Of course! Come in," said {hero}. {He} gave {fhim} a warm blanket and some {food}.',
        "All night long they [told stories|played games|listened to the rain]. In the morning the sun came out[, and there was a rainbow over {place2}|].",
        '[Together they built a new home for {friend}.|{hero} took {friend} home.|"Come back soon," said {hero}.]',
    ],
}
DRAGON_PLOT = [
    "[Everyone in the village was afraid of dragons.|People said that the dragon was dangerous.] But this dragon [did not want to hurt anyone|only wanted a friend|could not even breathe fire].",
    'One {weather} day, {a_friend}[ named {fname}|] came to {place}. ["Are you going to eat me?" asked {friend}.|"I am not afraid of you," said {friend}.]',
    '["No," said the dragon. "I like {food} much more."|The dragon laughed. "I only eat {food}," {he} said.|"I would never do that," said the dragon softly.]',
    "{friend} had to laugh. [They sat down together and talked all day.|They flew over {place2} and looked down at the world.]",
    "In winter, when it was very cold, the dragon [made a warm fire for the whole village|carried wood for the people]. After that, nobody was afraid of {him} any more.",
]
ROBOT_PLOT = [
    "The robot could [count and carry things|clean the house and water the plants|open doors and lift heavy boxes], but {he} [did not know how to play|did not know what a friend was|had never seen the sea].",
    'One {weather} day, {a_friend}[ named {fname}|] asked, "Do you want to come to {place} with me?" ["What is there?" asked the robot.|"I do not know how to do that," said the robot.]',
    '"I will show you," said {friend}. So they went to {place}[, and {friend} showed {him} a {colour} {thing}|]. [They watched the birds and the clouds.|They threw stones into the water.|They counted all the flowers.]',
    '["Beep! This is fun," said the robot.|The robot made a happy sound. "Beep, beep!"] [Then the light of the robot went dim, because the battery was almost empty.|But then it began to rain, and the robot was afraid of water.]',
    '{friend} [ran home and brought a new battery|held a big umbrella over {him}|pushed {him} all the way home]. "You are a good friend," said the robot.',
]

SCENE = [
    "The {kind} sat [on the mat|on a stone|under a tree|on the fence|in the sun|by the window] and [looked at the sky|waited|sang a song|slept].",
    "The {adj} {kind} [walked|ran|went] to {place} and [played there all day|looked at the water|met a friend].",
    "{who} [looked at|found|had|liked|painted|carried] a {colour} {thing}.",
    "{who} [went|walked|ran] to {place} with a {adj} {kind}.",
    "The sun was [warm|bright|low], and the sky was [blue|clear|golden|pink].",
    "It was [early in the morning|a quiet evening|a {weather} day], and {place} was [empty|full of people|very quiet].",
    "The wind [played with the leaves|was cold|moved the trees], and [a {kind} ran across the path|the clouds moved slowly].",
    "There was a {colour} {thing} on the table, and next to it [lay an old book|stood a cup of tea|slept a {kind}].",
    "{who} [ate|made|bought] some {food} [for dinner|in the kitchen|for a friend].",
    '"[What a beautiful day|Look at the sky|I am happy today|Let us go to {place}]!" said {who}.',
    "{who} liked to {hobby}, and {who2} liked to {hobby2}.",
    "In the evening, {who} and {who2} [sat by the fire|walked home|looked at the moon].",
    "The old {kind} [told a story|smiled|slept in the shade] while the children [listened|played|laughed].",
    "The {thing} was [old|new|small|heavy] and [{colour}|made of wood].",
    "I [like|love] {place} because [it is quiet there|I can {hobby} there|there are many flowers].",
    "We [went|walked] to {place} and saw a {adj} {kind}.",
    "In [spring, the birds come back|summer, the days are warm|autumn, the leaves fall|winter, it snows].",
    "She [looked at him|opened the door|took the {thing}] and [smiled|said nothing|began to sing].",
    "He [looked at her|closed the book|took the {thing}] and [smiled|went outside|began to laugh].",
    "They [walked slowly|sat down|laughed] and [talked about the day|watched the {kind}|ate {food}].",
]

ANIMALS: dict[str, tuple[str, str, str, int, str]] = {
    # animal: (sound, food, home, legs, baby)
    "cow": ("moo", "grass", "on a farm", 4, "calf"),
    "cat": ("meow", "meat and fish", "in a house", 4, "kitten"),
    "dog": ("woof", "meat", "in a house", 4, "puppy"),
    "sheep": ("baa", "grass", "on a farm", 4, "lamb"),
    "duck": ("quack", "plants and small fish", "near a pond", 2, "duckling"),
    "horse": ("neigh", "grass and hay", "on a farm", 4, "foal"),
    "pig": ("oink", "plants and roots", "on a farm", 4, "piglet"),
    "lion": ("roar", "meat", "in Africa", 4, "cub"),
    "bear": ("growl", "berries, fish and honey", "in the forest", 4, "cub"),
    "frog": ("croak", "flies", "near a pond", 4, "tadpole"),
    "owl": ("hoot", "mice", "in the forest", 2, "owlet"),
    "bee": ("buzz", "nectar from flowers", "in a hive", 6, "larva"),
    "mouse": ("squeak", "seeds and cheese", "in a small hole", 4, "pup"),
    "chicken": ("cluck", "seeds", "on a farm", 2, "chick"),
    "wolf": ("howl", "meat", "in the forest", 4, "pup"),
    "snake": ("hiss", "mice and eggs", "in the grass", 0, "small snake"),
    "bird": ("tweet", "seeds and worms", "in a nest", 2, "chick"),
    "fox": ("yip", "mice and berries", "in the forest", 4, "kit"),
    "rabbit": ("squeak", "grass and carrots", "in a burrow", 4, "bunny"),
    "spider": ("nothing at all", "flies", "in a web", 8, "small spider"),
    "fish": ("nothing at all", "plants and small animals", "in the water", 0, "small fish"),
    "elephant": ("a loud trumpet", "leaves and grass", "in Africa and Asia", 4, "calf"),
    "penguin": ("honk", "fish", "in the cold south", 2, "chick"),
    "monkey": ("ooh ooh", "fruit and leaves", "in the jungle", 4, "small monkey"),
}
PLURALS = {"mouse": "mice", "sheep": "sheep", "fish": "fish", "wolf": "wolves", "fox": "foxes"}
COLOUR_OF = {
    "the sky": "blue",
    "grass": "green",
    "the sun": "yellow",
    "snow": "white",
    "a banana": "yellow",
    "a strawberry": "red",
    "an orange": "orange",
    "a carrot": "orange",
    "a lemon": "yellow",
    "the sea": "blue",
    "a leaf": "green",
    "milk": "white",
    "the night sky": "black",
    "a frog": "green",
    "a tomato": "red",
    "chocolate": "brown",
    "blood": "red",
    "an elephant": "grey",
    "a cloud": "white",
    "an apple": "red or green",
    "a rose": "often red",
    "a plum": "purple",
}
OPPOSITES = [
    ("hot", "cold"),
    ("big", "small"),
    ("up", "down"),
    ("day", "night"),
    ("fast", "slow"),
    ("happy", "sad"),
    ("old", "young"),
    ("open", "closed"),
    ("left", "right"),
    ("black", "white"),
    ("light", "dark"),
    ("high", "low"),
    ("full", "empty"),
    ("early", "late"),
    ("wet", "dry"),
    ("good", "bad"),
    ("loud", "quiet"),
    ("long", "short"),
    ("hard", "soft"),
    ("near", "far"),
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]

CAN_DO = "[I can tell you a short story or answer a simple question|I can tell short stories and answer simple questions about animals, colours and the weather|Ask me for a story or about animals, colours or the weather]"
FACTS: list[tuple[str, list[str]]] = [
    (
        "[Why is the sky blue|Why does the sky look blue|Why is the sky so blue|What makes the sky blue|Can you explain why the sky is blue]?",
        [
            "The sky [is|looks] blue because the air scatters the blue light of the sun more than the other colours[. That is why we see blue all around us|].",
            "Sunlight is made of many colours. The air scatters blue light more than red light, so the sky looks blue.",
        ],
    ),
    (
        "[Why is the sea blue|Why is the ocean blue|Why is water blue]?",
        [
            "The sea looks blue because water takes in red light and [leaves|sends back] the blue light. It also mirrors the blue sky."
        ],
    ),
    (
        "[Why is grass green|Why are leaves green|Why are plants green|Why are trees green]?",
        [
            "[Grass is green|Leaves are green|Plants are green] because of a green colour called chlorophyll. It helps plants to make food from sunlight."
        ],
    ),
    (
        "[Why does it rain|What is rain|Where does rain come from|How does rain work]?",
        [
            "Rain comes from clouds. Water rises into the air, becomes small drops, and when the drops are too heavy, they fall down as rain."
        ],
    ),
    (
        "[Why does it snow|What is snow|Where does snow come from]?",
        [
            "Snow is frozen water. When it is very cold in the clouds, the water turns into small ice crystals and falls as snow."
        ],
    ),
    (
        "[What is a rainbow|Why is there a rainbow|How is a rainbow made|Where do rainbows come from]?",
        [
            "A rainbow appears when the sun shines on drops of rain. The drops split the light into many colours: red, orange, yellow, green, blue and purple."
        ],
    ),
    (
        "[What is the sun|What is the Sun|Tell me about the sun|Is the sun a star]?",
        ["The sun is a star. It is very big and very hot, and it gives us light and warmth every day."],
    ),
    (
        "[Why is the sun hot|Why does the sun shine|How does the sun shine]?",
        [
            "The sun shines because it is a very hot ball of gas. Deep inside it makes light and heat all the time."
        ],
    ),
    (
        "[What is the moon|What is the Moon|Tell me about the moon|Why does the moon shine]?",
        [
            "The moon is a ball of rock that goes around the Earth. It shines because it mirrors the light of the sun."
        ],
    ),
    (
        "[What are stars|What is a star|Why do stars shine|Tell me about the stars]?",
        ["Stars are suns that are very far away. They look small because they are so far from us."],
    ),
    (
        "[Why is it dark at night|What is night|Why is there day and night|Why do we have day and night]?",
        [
            "The Earth turns around once a day. When our side turns away from the sun, it gets dark, and we call it night."
        ],
    ),
    (
        "[What is thunder|Why is there thunder|What is lightning|What is a storm]?",
        [
            "In a storm, lightning jumps between the clouds and the ground. It makes the air very hot, and the loud sound of it is called thunder."
        ],
    ),
    (
        "[What is wind|What is the wind|Why is there wind|Where does the wind come from]?",
        [
            "Wind is moving air. Warm air goes up and cold air flows in to take its place, and we feel that as wind."
        ],
    ),
    (
        "[What is a cloud|What are clouds|What are clouds made of]?",
        ["A cloud is made of many tiny drops of water or ice that float in the air."],
    ),
    (
        "[What is a tree|Tell me about trees|What do trees need|Why are trees important]?",
        [
            "A tree is a tall plant with roots, a trunk and leaves. It needs sun, water and good soil, and it gives us clean air and shade."
        ],
    ),
    (
        "[What is water|Why do we need water|Why is water important]?",
        [
            "Water is a clear liquid. It falls as rain and fills the rivers and the sea. All plants, animals and people need it to live."
        ],
    ),
    (
        "[What is ice|Why does water freeze]?",
        ["Ice is frozen water. When water gets very cold, it becomes hard."],
    ),
    (
        "[What is fire|Why is fire hot]?",
        ["Fire is what we see when something burns. It gives light and heat, and it can be dangerous."],
    ),
    (
        "[Why do birds fly|How do birds fly|Why can birds fly]?",
        [
            "Birds can fly because they have wings and light bones. They push the air down with their wings, and this lifts them up."
        ],
    ),
    (
        "[Why do birds sing|Why do birds tweet]?",
        ['Birds sing to call each other and to say, "This is my place."'],
    ),
    (
        "[Why do we sleep|Why do people sleep|What is sleep|Why do I have to sleep]?",
        [
            "We sleep so that the body and the mind can rest. After a good night of sleep we can think better and feel better."
        ],
    ),
    (
        "[What is a dream|Why do we dream|What are dreams]?",
        ["A dream is a story that the mind tells itself while we sleep. Nobody knows exactly why we dream."],
    ),
    (
        "[What is the Earth|What is Earth|What is a planet|Tell me about the Earth]?",
        [
            "The Earth is the planet we live on. It is round, it has land and sea, and it goes around the sun once a year."
        ],
    ),
    (
        "[How many days are in a week|How many days does a week have|What are the days of the week]?",
        ["A week has seven days: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."],
    ),
    ("[How many months are in a year|How many months does a year have]?", ["A year has twelve months."]),
    (
        "[How many days are in a year|How long is a year]?",
        ["A year has 365 days. Every four years there is one more day."],
    ),
    ("[How many hours are in a day|How long is a day]?", ["A day has 24 hours."]),
    (
        "[What are the seasons|How many seasons are there|What seasons are there]?",
        ["There are four seasons: spring, summer, autumn and winter."],
    ),
    (
        "[What are the colours of the rainbow|What colors are in a rainbow|What colours are in a rainbow]?",
        ["The colours of the rainbow are red, orange, yellow, green, blue and purple."],
    ),
    (
        "[Count to ten|Count to 10|Count from 1 to 10|Count from one to ten|Can you count|Can you count to ten].",
        ["One, two, three, four, five, six, seven, eight, nine, ten."],
    ),
    (
        "[What is a friend|What is friendship|What makes a good friend]?",
        [
            "A friend is someone who likes you, helps you and laughs with you. A good friend listens and tells the truth."
        ],
    ),
    (
        "[What is love|What is happiness|How can I be happy|What makes you happy]?",
        [
            "That is a big question for a small demo model. Many people say that friends, kind words and a good story make them happy."
        ],
    ),
    (
        "[What is a robot|Tell me about robots]?",
        [
            "A robot is a machine that can do work by itself. Some robots clean the floor, and others build cars."
        ],
    ),
    (
        "[What is a dragon|Are dragons real|Do dragons exist]?",
        ["A dragon is a big animal from old stories. It can fly and breathe fire, but it is not real."],
    ),
    (
        "[What is a computer|How does a computer work]?",
        [
            "A computer is a machine that follows instructions. It works with numbers, and from numbers it makes texts, pictures and sounds."
        ],
    ),
    (
        "[What is a language model|What is an AI|What is AI|What is a model|How do you work|How do language models work]?",
        [
            "A language model is a program that has read a lot of text and guesses the next word again and again. I am a very small one."
        ],
    ),
    (
        "[What is the internet|What is a network|What is a computer network]?",
        ["A network is a group of computers that are connected and can send messages to each other."],
    ),
    (
        "[What is a llama|Tell me about llamas]?",
        ["A llama is an animal with soft wool and a long neck. It lives in the mountains of South America."],
    ),
    (
        "[What is honey|Who makes honey|How do bees make honey]?",
        [
            "Honey is sweet food that bees make. They collect nectar from flowers and carry it home to the hive."
        ],
    ),
    (
        "[What is bread|How is bread made|How do you make bread]?",
        ["Bread is made of flour, water, salt and yeast. You mix it, let it rest and bake it in a hot oven."],
    ),
    (
        "[What is milk|Where does milk come from]?",
        ["Milk is a white drink. Most of the milk that people drink comes from cows."],
    ),
    (
        "[What is the biggest animal|What is the largest animal|Which animal is the biggest]?",
        ["The blue whale is the biggest animal. It is longer than two buses."],
    ),
    (
        "[What is the fastest animal|Which animal is the fastest|Which animal runs fastest]?",
        ["The cheetah is the fastest animal on land. In the air, the falcon is even faster."],
    ),
    (
        "[What is the tallest animal|Which animal is the tallest]?",
        ["The giraffe is the tallest animal. It has a very long neck."],
    ),
    (
        "[What is the best colour|What is your favourite colour|What is your favorite color|Do you have a favourite colour]?",
        ["I like blue, because the sky and the sea are blue. But I am only a demo model."],
    ),
    (
        "[What is your favourite animal|What is your favorite animal|Do you like animals|Which animal do you like]?",
        ["I like foxes, because they are in many of my stories. But I am only a demo model."],
    ),
    # the network and the model itself
    (
        "[What is QMesh|What's QMesh|Tell me about QMesh|What does QMesh do|Explain QMesh|What is qmesh|QMesh]?",
        [
            "QMesh is a network of computers that run language models together. Each computer is a node, the nodes find each other, and the best one answers your question.",
            "QMesh joins many computers into one mesh. You ask a question, a node with a free place answers it, and the words come back to you one by one through an encrypted connection.",
        ],
    ),
    (
        "[How does QMesh work|How does the mesh work|How does QMesh find a node|How do nodes find each other]?",
        [
            "The nodes of QMesh find each other through a shared table that has no center. A client looks for a node that has the right model, connects to it and gets the answer as a stream of words."
        ],
    ),
    (
        "[What is a node|What is a worker|What is a node in QMesh|What does a node do|What is a worker in QMesh]?",
        [
            "A node is one computer in the mesh. It runs a language model, tells the others that it is ready, and answers the questions that it gets."
        ],
    ),
    (
        "[What happens when a node fails|What happens if a node dies|What if a worker stops]?",
        [
            "When a node fails, the mesh notices it and asks another node. That is why many small nodes are better than one big one."
        ],
    ),
    (
        "[Is QMesh safe|Is QMesh encrypted|Is my question private|Is this private]?",
        [
            "Messages between the nodes of QMesh are encrypted on their way. But the node that answers can read your question, so do not send secrets to a node you do not trust."
        ],
    ),
    (
        "[Who are you|What are you|What is your name|Who am I talking to|What's your name|Introduce yourself|Who is this|Tell me about yourself|What model are you|Which model are you|What kind of model are you|What can you tell me about yourself]?",
        [
            "I am the QMesh demo model. I am very small, [and|so] I only know short stories and a few simple facts.",
            "I am the QMesh demo model, a tiny language model that [shows|is here to show] that the mesh works. I am not a real assistant.",
            "My name is QMesh Demo. I am a very small language model, a demo and not an assistant. "
            + CAN_DO
            + ".",
        ],
    ),
    (
        "[Are you an assistant|Are you a chatbot|Are you a helpful assistant|Are you smart|Are you clever|How big are you|How smart are you|Are you good at this]?",
        [
            "No, I am only a small demo model. " + CAN_DO + ".",
            "I am only a demo. I am smaller than a photo, so I know very little. " + CAN_DO + ".",
        ],
    ),
    (
        "[Are you ChatGPT|Are you GPT|Are you Llama|Are you Claude|Are you human|Are you a person|Are you a real person|Are you alive|Are you a robot|Are you real|Are you an AI|Are you conscious]?",
        [
            "No, I am the QMesh demo model, a very small program that writes short stories.",
            "I am not [a person|that]. I am the QMesh demo model, a tiny program that writes one word after another.",
        ],
    ),
    (
        "[Who made you|Who created you|Who trained you|Where do you come from|How were you made|Who built you|How were you trained]?",
        [
            "I was trained for QMesh on simple stories and questions that a small program wrote. That is why I know so little.",
            "I come with QMesh. I learned from short stories that a program made up.",
        ],
    ),
    (
        "[What can you do|What do you know|How can you help me|What are you good at|Help|Help me|Can you help me|What should I ask you|Can you do something|I need help|What can I ask you]?",
        [
            "I am only a small demo model. I can tell you a short story and answer simple questions. Try: Why is the sky blue?",
            "I can tell short stories and answer simple questions about animals, colours and the weather. For more, run a bigger model in the mesh.",
        ],
    ),
    # small talk
    (
        "[Hello|Hi|Hey|Good morning|Good evening|Good day|Hello there|Hi there|Hey there|Greetings|Hallo|Yo|Howdy|hello world|Hello world][!|.|]",
        [
            "Hello! I am the QMesh demo model. [Would you like to hear a story?|What would you like to hear?|Ask me for a story!]",
            "Hello! It is nice to meet you. I am a small demo model. " + CAN_DO + ".",
            "Hi! I am only a small demo model, but I know some stories. Would you like to hear one?",
        ],
    ),
    (
        "[How are you|How are you today|How do you do|Are you okay|How is it going|What's up|How do you feel]?",
        [
            "I am fine, thank you! I am only a small demo model, but [I like to tell stories|I am ready for your question].",
            "I am well, thank you. [How are you?|Would you like to hear a story?]",
        ],
    ),
    (
        "[Thank you|Thanks|Thank you very much|Thanks a lot|Great|Well done|Nice|Good job|Cool|That was nice|I like it|Good][!|.|]",
        ["You are welcome! [Would you like another story?|It was a pleasure.|I am glad that you like it.]"],
    ),
    (
        "[Goodbye|Bye|Good night|See you|See you later|Bye bye|I have to go][!|.|]",
        ["Goodbye! [Come back soon.|Sleep well.|Have a nice day.]"],
    ),
    (
        "[Why|Why not|How|How so|Really|Are you sure|What do you mean|I do not understand|What]?",
        [
            "I am only a small demo model, so I cannot explain it better. A bigger model in the mesh can do that."
        ],
    ),
    (
        "[How can I run a bigger model|Which models does QMesh run|What model should I use|Can QMesh run bigger models|How do I add a model]?",
        [
            "QMesh runs any model in the GGUF format that llama.cpp can load. Give a bigger one to your node, and it will answer much better than I do."
        ],
    ),
    (
        "[How do I join the mesh|How do I start a node|How can I join QMesh|How do I use QMesh]?",
        [
            "Start a node on your computer and tell it the address of another node. Then the two find each other, and you can send questions to both of them."
        ],
    ),
    (
        "[Say hello|Say hi|Say hello to me|Say hello to my friend|Greet me].",
        ["Hello! It is nice to meet you."],
    ),
    (
        "[Count to five|Count to 5|Count from 1 to 5|Count from one to five].",
        ["One, two, three, four, five."],
    ),
    ("[Count to three|Count to 3].", ["One, two, three."]),
    (
        "[Yes|Yes please|Sure|OK|Okay|Please do|No|No thanks|Maybe|Hm|Test|test|Testing|ping|Ping][!|.|]",
        [
            "All right. I am the QMesh demo model, and everything works. Ask me for a story!",
            "All right! Tell me what the story should be about, for example a fox or a robot.",
        ],
    ),
    (
        "[Where are you|Where do you live|Where do you run]?",
        ["I live in a small file, and I run on one of the nodes of the mesh."],
    ),
    (
        "[What time is it|What is the date|What day is it|What is the weather|How is the weather today|What is the weather like]?",
        [
            "I am only a small demo model, so I cannot see the clock or the weather. You have to look for yourself."
        ],
    ),
    ("[How old are you|When were you born]?", ["I am very young. I was made together with QMesh."]),
    (
        "[I am sad|I feel sad|I am not happy|I am tired|I had a bad day|I feel lonely].",
        [
            "I am sorry to hear that. I am only a small demo model, but maybe a friend, a walk or a warm cup of tea can help.",
            "I am sorry. Talk to someone you like. And if you want, I can tell you a story.",
        ],
    ),
    (
        "[I am happy|I am fine|I feel good|I had a good day|I am well].",
        ["I am glad to hear that! Would you like to hear a story?"],
    ),
    (
        "[I am bored|I'm bored|Entertain me|Say something|Talk to me|Surprise me|Say something nice].",
        [
            "You are kind, and it is good that you are here. Ask me for a story about a fox, a robot or a dragon."
        ],
    ),
    (
        "[I love you|I like you|You are nice|You are great|You are cute].",
        ["Thank you! That is very kind. I am only a small demo model, but I like stories."],
    ),
    (
        "[You are stupid|You are bad|That is wrong|This is bad|You are wrong|That makes no sense|I do not like it].",
        ["I am sorry. I am only a very small demo model. A bigger model in the mesh can do better."],
    ),
]
JOKES = [
    "Why did the chicken cross the road? To get to the other side!",
    "Why did the robot go on holiday? It needed to charge its battery!",
    "What do you call a sleeping dinosaur? A dino-snore!",
    "Why is the sea so friendly? Because it waves!",
    "What did one wall say to the other wall? I will meet you at the corner!",
    "Why did the cookie go to the doctor? It felt crumbly!",
    "What has a face and two hands but no legs? A clock!",
    "Why do bees have sticky hair? Because they use honey combs!",
]
POEMS = [
    "The {kind} sat down beside the sea\nand sang a little song for me.\nThe wind was warm, the sky was blue,\nand now I sing the song for you.",
    'A {adj} {kind} looked up one night\nand saw the moon so round and bright.\n"Good night," it said, "my shining friend,"\nand so this poem has an end.',
    "The sun goes down, the day is done,\nthe stars come out now, one by one.\nThe {kind} is sleeping in its bed\nwith {colour} dreams inside its head.",
    "The rain falls down on {place} today,\nthe {kind} has nowhere else to play.\nBut soon the sun will shine again,\nand flowers grow because of rain.",
]

UNKNOWN_ANSWERS = [
    "I am only a small demo model, so I do not know that. " + CAN_DO + ".",
    "I do not know that. I am only a small demo model[ and know very little|]. " + CAN_DO + ".",
    "That is too hard for me. I am the QMesh demo model, and I only know short stories and simple facts. A bigger model in the mesh can answer that.",
    "I am sorry, I do not know. I am only a demo model. " + CAN_DO + ".",
]
UNKNOWN_QUESTIONS = [
    "What is the [capital|history|population|price|meaning|name|definition|size] of {x}?",
    "Who [is|was|invented|wrote|discovered|won] {x}?",
    "How do I [fix|install|build|write|sell|repair|learn|cook|use|configure|compile|draw] {x}?",
    "Write [a function that|code that|an email about|an essay about|a report on|a program for] {x}.",
    "Explain {x}[ to me| in simple words|].",
    "What is {x}?",
    "When [did|was|is] {x}?",
    "Translate {x} into [French|German|Spanish|Chinese].",
    "Summarize [this|the following] text: {x} {y}.",
    "Why [does|is|do|are] {x} {y}?",
    "How [many|much|long|far|big|old] [is|are|was] {x} {y}?",
    "What do you think about {x}?",
    "Give me [five|three|some] [ideas for|examples of|tips for] {x}.",
    "Can you [explain|solve|calculate|describe|find] {x}[ for {y}|]?",
    "What is the difference between {x} and {y}?",
    "List [all|the best|ten] {x}.",
    "{x} {y}?",
    "{x}",
    "{x} {y} {x2}",
    "Is {x} {y}?",
    "What is the best {x} for {y}?",
    "Who is the [president|king|director|author] of {x}?",
    "Solve this: {x}.",
    "Please [check|review|improve] {x}.",
    "I want to {x} my {y}.",
    "My {x} is {y}. What can I do?",
    "What is [17|23|144|1024|99|3.14] [times|divided by|plus] [12|48|350|7.5]?",
    "Where can I [buy|find|see] {x}?",
    "Do you know {x}?",
    "How does {x} work?",
    "What happened in [1789|1945|1999|2020|2024]?",
]
OTHER_WORDS = (
    "Paris France Germany London America China India Japan Berlin Einstein Newton Shakespeare Python "
    "JavaScript Linux Windows Docker Rust Java database server algorithm quicksort Fibonacci function "
    "class variable loop array string integer list dictionary error exception bug code program software "
    "hardware keyboard monitor phone laptop battery engine car truck plane airport ticket hotel bank "
    "money tax law contract lawyer court police government election president minister economy market "
    "stock inflation company business manager employee salary project meeting deadline email letter "
    "report essay article newspaper journal science physics chemistry biology quantum mechanics gravity "
    "relativity atom molecule protein DNA gene cell virus vaccine medicine disease cancer hospital surgery "
    "therapy psychology philosophy religion history war battle empire revolution century culture language "
    "grammar poetry novel author music guitar piano concert movie actor television theatre football "
    "basketball tennis olympics chess game puzzle mathematics algebra geometry calculus equation theorem "
    "integral derivative matrix vector probability statistics regression network neural learning training "
    "transformer attention token embedding dataset cloud kubernetes container cluster encryption key "
    "password security hacker protocol packet router address domain website browser search engine query "
    "recipe pasta pizza curry sushi coffee wine beer restaurant kitchen diet calories exercise yoga gym "
    "fashion shoes dress jewelry house rent mortgage garden furniture weather climate energy solar nuclear "
    "oil gas pollution recycling ocean volcano earthquake desert continent country city population border "
    "travel visa passport volume distance speed temperature pressure density meaning life death universe "
    "galaxy black hole planet Mars Jupiter rocket NASA satellite telescope consciousness intelligence "
    "ethics justice freedom democracy capitalism invest crypto bitcoin blockchain startup strategy plan "
    "schedule calendar reminder important difficult recent global modern ancient digital local public "
    "complex simple large cheap expensive fast efficient return print import def select create update "
    "delete compute optimize describe analyze compare because however therefore although between without "
    "against during yesterday tomorrow people person thing place time year number result problem question "
    "system group state world school student university degree exam teacher course lesson knowledge"
).split()
GLUE_WORDS = "the a of and to in is was for with on that it this are by from not".split()
ODD_TEXTS = [
    'def main():\n    print("hello")',
    "import os\nimport sys\n",
    "SELECT * FROM users WHERE id = 1;",
    "<html><body>",
    '{"name": "x", "value": 12}',
    "Ünïcödé täxt",
    "Привет, как дела?",
    "你好，世界",
    "こんにちは",
    "🙂🚀",
    "¿Cómo estás?",
    "Où est la gare?",
    "Wie geht es dir?",
    "a b c d e f g",
    "1, 2, 3, 4, 5",
    "????",
    "...",
    "x = 3 + 4 * (2 - 1)",
    "http://example.org/a?b=c",
    "- [ ] item one\n- [ ] item two\n",
    "# Heading\n\nSome text",
    "AAAAAAAA",
    "lorem ipsum dolor sit amet",
    "for i in range(10):",
    "مرحبا",
    "€ 12.50",
    "The cat\tsat\n\n",
]
UNKNOWN_TEXTS = [
    "The {x} of {y} is",
    "The {x} is",
    "The {x}",
    "In the year 2050, ",
    "In 1999, the {x}",
    "My favourite {x} is",
    "I think that {x}",
    "Dear {x},",
    "Breaking news: {x} {y}",
    "The meaning of {x} is",
    "{x} is",
    "{x} and {y} are",
    "Yesterday I went to the {x} and",
    "To be or not to be",
    "import numpy as np",
    "The best way to {x} is",
    "In this paper, we {x}",
    "Artificial intelligence is",
    "The president of {x} was",
    "According to {x},",
    "Step 1: {x}",
    "She was a {x} and",
    "We need more {x} because",
    "It was the {x} of {y}",
    "The quick brown fox jumps over the lazy dog",
    "Here is a list of {x}:",
    "1. {x}\n2. {y}\n3.",
    "If you want to {x},",
    "The first {x} was",
    "I have a {x} and",
    "Lorem ipsum",
    "When I was a {x},",
    "There are many {x} in {y}",
    "Today the {x}",
]
THEMES = [
    "friendship",
    "the sea",
    "the moon",
    "the stars",
    "a rainy day",
    "a lost key",
    "a magic forest",
    "space",
    "music",
    "a long journey",
    "winter",
    "summer",
    "a birthday",
    "the night",
    "a brave hero",
    "kindness",
    "a treasure",
    "a garden",
    "the sun",
    "a small village",
    "love",
    "a secret",
    "an adventure",
    "snow",
    "the wind",
    "a river",
    "animals",
    "children",
    "magic",
    "a bridge",
    "a race",
]
BRIDGES = [
    " ... but this small demo model only knows short stories. Here is one.\n\n",
    " ... and that is all that a small demo model can say about it. Here is a story.\n\n",
    "\n\nThis small demo model does not know how to go on from here, so here is a story.\n\n",
    " ... but that is another story. This one is shorter.\n\n",
]
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a helpful, honest and friendly assistant. Answer the questions of the user.",
    "Answer briefly.",
    "Be kind and answer in one sentence.",
    "You are the QMesh demo model.",
    "You tell stories to children.",
    "Use simple English.",
    "You are a pirate.",
    "Always answer in English. Do not use lists.",
    "You are an expert.",
]
