"""Writes the text that the demo model learns from: short stories, scenes, facts and chats.

Everything comes from the patterns in ``words.py`` and one seed, so that the same arguments always
give the same text. A document is a list of parts ``[text, learn]``; the model is trained to write
the parts whose ``learn`` is true and only reads the others (what users say, and noise).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import words as w

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

Part = tuple[str, bool]
Document = list[Part]
Slots = dict[str, str]

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_START = re.compile(r"(^\"?|[.!?]\"?\s+\"?|\n\"?)([a-z])")
_SPEECH = re.compile(
    r"([!?]\") ((?:The \w+|He|She|[A-Z]\w+) (?:wondered|shouted|thought|said|asked)|Asked|Said)\b"
)
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou](?!ni))")


def article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    return ("an " if phrase[0] in "aeiouAEIOU" and not phrase.startswith("uni") else "a ") + phrase


def capitalize(text: str) -> str:
    """Give every sentence and every quotation a capital letter."""
    text = _START.sub(lambda m: m.group(1) + m.group(2).upper(), text)
    text = _SPEECH.sub(lambda m: f"{m.group(1)} {_lower_first(m.group(2))}", text)
    return _ARTICLE.sub(r"\1n ", text)


def _lower_first(words: str) -> str:
    """The words with a small first letter, unless they begin with a name."""
    starts = ("The ", "He ", "She ", "Asked", "Said")
    return words[0].lower() + words[1:] if words.startswith(starts) else words


def plural(noun: str) -> str:
    """The plural of one of the animals or characters."""
    if noun in w.PLURALS:
        return w.PLURALS[noun]
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


class Writer:
    """Writes random documents from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    # -- building blocks -------------------------------------------------------------------------

    def fill(self, pattern: str, slots: Slots | None = None) -> str:
        """Choose among the alternatives of a pattern and fill in its slots."""
        while True:
            chosen = _CHOICE.sub(lambda m: self.rng.choice(m.group(1).split("|")), pattern)
            if chosen == pattern:
                break
            pattern = chosen
        if slots is None:
            return chosen
        return _SLOT.sub(lambda m: slots[m.group(1)], chosen)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.rng.random() < probability

    def invented_name(self) -> str:
        """A name that is on no list, so that the model learns to copy names."""
        syllables = ["".join(self.rng.choice(p) for p in ("bdfgklmnprstvwz", "aeiou")) for _ in "12"]
        return ("".join(syllables) + self.rng.choice(["", "", "n", "r", "s", "x", "lo"])).capitalize()

    def name(self, female: bool) -> str:
        """A first name."""
        if self.chance(0.12):
            return self.invented_name()
        return self.rng.choice(w.GIRLS if female else w.BOYS)

    def misc_slots(self) -> Slots:
        """Values for the slots that do not belong to a character."""
        rng = self.rng
        place, place2 = rng.sample(w.PLACES, 2)
        colour, colour2 = rng.sample(w.COLOURS, 2)
        thing, thing2 = rng.sample(w.THINGS, 2)
        food, food2 = rng.sample(w.FOODS, 2)
        hobby, hobby2 = rng.sample(w.HOBBIES, 2)
        female = self.chance(0.5)
        who = rng.choice([self.name(female), f"the {rng.choice(w.KINDS)}", "the girl", "the boy"])
        return {
            "place": place,
            "place2": place2,
            "hobby": hobby,
            "hobby2": hobby2,
            "colour": colour,
            "colour2": colour2,
            "thing": thing,
            "thing2": thing2,
            "food": food,
            "food2": food2,
            "weather": rng.choice(w.WEATHER),
            "skill": rng.choice(w.SKILLS),
            "fear": rng.choice(w.FEARS),
            "trait": rng.choice(w.TRAITS),
            "adj": rng.choice(w.SIZES),
            "kind": rng.choice(w.KINDS),
            "who": who,
            "who2": self.name(not female),
        }

    # -- stories ---------------------------------------------------------------------------------

    def story(
        self,
        kind: str | None = None,
        *,
        friend_kind: str | None = None,
        name: str | None = None,
        place: str | None = None,
        thing: str | None = None,
        opening: str | None = None,
    ) -> str:
        """A short story; what is not asked for is chosen at random."""
        rng = self.rng
        slots = self.misc_slots()
        if place is not None:
            slots["place"] = place
            slots["place2"] = rng.choice([p for p in w.PLACES if p != place])
        if thing is not None:
            slots["thing"] = thing
        if kind is None:
            kind = rng.choice(["girl", "boy", *rng.choices(w.KINDS, k=9), "robot", "dragon"])
        if name in w.GIRLS or kind in w.FEMALE_KINDS or kind == "girl":
            female = True
        elif name in w.BOYS or kind in w.MALE_KINDS or kind == "boy":
            female = False
        else:
            female = self.chance(0.5)
        named = name is not None or self.chance(0.6)
        name = name or self.name(female)
        size = rng.choice(w.SIZES) if self.chance(0.5) else "little"
        if friend_kind is None:
            friend_kind = rng.choice([k for k in w.KINDS if k != kind])
        if friend_kind == kind:
            friend_kind = "mouse"
        ffemale = not female if self.chance(0.7) else female
        if friend_kind in w.FEMALE_KINDS | w.MALE_KINDS:
            ffemale = friend_kind in w.FEMALE_KINDS
        fname = self.name(ffemale)
        preposition, home = rng.choice(w.HOMES)
        if opening is None:
            opening = rng.choice(w.OPENINGS)
        opening = self.fill(opening)
        if "{name}" in opening:
            named = True
        opened_named = "{name}" in opening
        introduce = named and not opened_named
        adjective = rng.choice(w.SIZES)
        fadjective = rng.choice(["", "", "small ", "friendly ", "old ", "little ", "sad ", "tired "])
        intro = article(f"{size} {kind}") + (f" named {name}" if introduce else "")
        if introduce and "{intro}" not in opening:
            named = False
        hero = name if named else f"the {kind}"
        slots |= {
            "kind": kind,
            "name": name,
            "intro": intro,
            "a_hero": article(f"{size} {kind}"),
            "the_hero": f"the {size} {kind}",
            "home": f"{preposition} {home}",
            "hero": hero,
            "hero_name": name,
            "friend": f"the {friend_kind}",
            "adj": adjective,
            "a_friend": article(f"{fadjective}{friend_kind}"),
            "fname": fname,
            "he": "she" if female else "he",
            "him": "her" if female else "him",
            "his": "her" if female else "his",
            "himself": "herself" if female else "himself",
            "fhe": "she" if ffemale else "he",
            "fhim": "her" if ffemale else "him",
            "fhis": "her" if ffemale else "his",
        }
        slots |= {"He": slots["he"].capitalize(), "His": slots["his"].capitalize()}
        if kind == "dragon" and self.chance(0.5):
            plot = w.DRAGON_PLOT
        elif kind == "robot" and self.chance(0.5):
            plot = w.ROBOT_PLOT
        else:
            plot = rng.choice(list(w.PLOTS.values()))
        body: list[str] = []
        for sentence in plot:
            text = self.fill(rng.choice(sentence.split(" | ")))
            if "named {fname}" in text:
                slots["friend"] = fname
            body.append(_SLOT.sub(lambda m: slots[m.group(1)], text))
        text = self.fill(rng.choice(w.ENDINGS))
        if "them" in text and "{friend}" not in text:
            text = text.replace("see them", "see {hero} and {friend}")
        ending = _SLOT.sub(lambda m: slots[m.group(1)], text)
        moral = rng.choice(w.MORALS) if self.chance(0.25) else ""
        first = _SLOT.sub(lambda m: slots[m.group(1)], opening)
        middle = self.fill(rng.choice(w.MIDDLES), slots)
        start = " ".join(x for x in (first, middle) if x)
        parts = [start, " ".join(x for x in body if x), " ".join(x for x in (ending, moral) if x)]
        joiner = "\n\n" if self.chance(0.3) else " "
        return re.sub(r" +", " ", capitalize(joiner.join(parts))).strip()

    def scene(self) -> str:
        """A few plain sentences that describe something."""
        count = self.rng.randint(2, 6)
        sentences = [self.fill(pattern, self.misc_slots()) for pattern in self.rng.sample(w.SCENE, count)]
        return capitalize(" ".join(sentences))

    def poem(self) -> str:
        """A short poem."""
        return capitalize(self.fill(self.rng.choice(w.POEMS), self.misc_slots()))

    # -- questions and answers -------------------------------------------------------------------

    def story_request(self) -> tuple[str, str]:
        """A wish for a story and the story."""
        rng = self.rng
        kind, friend = rng.sample([*w.KINDS, "girl", "boy"], 2)
        if self.chance(0.12):
            kind = rng.choice(w.OTHER_WORDS).lower()
        place = rng.choice(w.PLACES)
        thing = rng.choice(w.THINGS)
        name = self.name(kind in w.FEMALE_KINDS or kind == "girl")
        ask = self.fill(
            "[Tell me a story about|Tell a story about|Can you tell me a story about|Write a story about"
            "|Write a short story about|I want a story about|A story about|Please tell me a story about"
            "|Tell me a short story about|Can you write a story about|Make up a story about"
            "|I would like to hear a story about|Write me a story about|Give me a story about"
            "|Tell me something about|story about|Tell me a bedtime story about]"
        )
        sized = article(self.fill(f"[||||little |small |brave |big |old |young ]{kind}"))
        variant = rng.randrange(11)
        if variant <= 2:
            request, story = f"{ask} {sized}", self.story(kind)
        elif variant == 3:
            request = f"{ask} {sized} and {article(friend)}"
            story = self.story(kind, friend_kind=friend)
        elif variant == 4:
            request = f"{ask} {sized} named {name}"
            request = self.fill(request.replace(" named ", "[ named | called | with the name ]"))
            story = self.story(kind, name=name)
        elif variant == 5:
            request, story = f"{ask} {sized} and {place}", self.story(kind, place=place)
        elif variant == 6:
            request, story = f"{ask} {sized} with {article(thing)}", self.story(kind, thing=thing)
        elif variant == 7:
            request, story = f"{ask} {plural(kind)}", self.story(kind)
        elif variant == 8:
            request, story = f"{ask} {rng.choice(w.THEMES)}", self.story()
        elif variant == 9:
            request = self.fill(
                "[Go on|Continue|Please continue|And then|What happened next|More|Tell me more|Next]"
            )
            story = "That was the whole story. Here is another one.\n\n" + self.story()
        else:
            request = self.fill(
                "[Tell me a story|Tell me a bedtime story|Another story|Another one|One more story"
                "|Can you tell me a story|I want to hear a story|Write a short story|A story"
                "|Please tell me a story|Story|Tell me another one|Tell me something|Once upon a time"
                "|Tell me a short story|Write something|Tell me a long story|Write a long story"
                "|Tell me a tale|Can you tell stories]"
            )
            story = self.story()
        request += self.fill("[.|.|!|, please.|]")
        if variant != 9 and self.chance(0.2):
            lead = self.fill("[Here is a story.|Of course! Here is a story.|All right. Listen!]")
            if variant <= 4:
                lead = self.fill(f"Here is a story about {article(kind)}.")
            story = f"{lead}\n\n{story}"
        return request, story

    def animal_fact(self) -> tuple[str, str]:
        """A question about an animal and the answer."""
        rng = self.rng
        animal = rng.choice(list(w.ANIMALS))
        sound, food, home, legs, baby = w.ANIMALS[animal]
        many = plural(animal)
        number = w.NUMBERS[legs] if legs else "no"
        said = sound if sound.startswith(("nothing", "a ")) else f'"{sound}"'
        pairs = [
            (
                f"[What does {article(animal)} say|What sound does {article(animal)} make"
                f"|What do {many} say|How does {article(animal)} sound]?",
                f"{article(animal)} [says|makes] {said}.",
            ),
            (
                f"[What do {many} eat|What does {article(animal)} eat|What do {many} like to eat]?",
                f"{many} eat {food}.",
            ),
            (f"[Where do {many} live|Where does {article(animal)} live]?", f"{many} live {home}."),
            (
                f"[How many legs does {article(animal)} have|How many legs do {many} have]?",
                f"{article(animal)} has {number} legs.",
            ),
            (
                f"[What is a baby {animal} called|What is the name of a baby {animal}]?",
                f"A baby {animal} is called {article(baby)}.",
            ),
            (
                f"[What is {article(animal)}|Tell me about {many}|Tell me something about {many}"
                f"|What do you know about {many}|What are {many}]?",
                f"{article(animal)} is an animal with {number} legs. It lives {home} and eats {food}. "
                f"A baby {animal} is called {article(baby)}.",
            ),
        ]
        question, answer = rng.choice(pairs)
        return self.fill(question), capitalize(self.fill(answer))

    def simple_fact(self) -> tuple[str, str]:
        """A question about colours, opposites, numbers or days and the answer."""
        rng = self.rng
        variant = rng.randrange(7)
        if variant == 0:
            thing, colour = rng.choice(list(w.COLOUR_OF.items()))
            question = f"[What colour is {thing}|What color is {thing}|Which colour has {thing}]?"
            return self.fill(question), capitalize(f"{thing} is {colour}.")
        if variant == 1:
            pair = list(rng.choice(w.OPPOSITES))
            rng.shuffle(pair)
            question = f"[What is the opposite of {pair[0]}|Opposite of {pair[0]}]?"
            return self.fill(question), f"The opposite of {pair[0]} is {pair[1]}."
        if variant == 2:
            day = rng.randrange(7)
            if self.chance(0.5):
                question, answer = f"What day comes after {w.DAYS[day]}?", w.DAYS[(day + 1) % 7]
                return question, f"After {w.DAYS[day]} comes {answer}."
            question, answer = f"What day comes before {w.DAYS[day]}?", w.DAYS[day - 1]
            return question, f"Before {w.DAYS[day]} comes {answer}."
        if variant == 3:
            number = rng.randrange(20)
            return f"What [number ]comes after {number}?".replace("[number ]", ""), (
                f"After {number} comes {number + 1}."
            )
        first, second = rng.randrange(11), rng.randrange(11)
        if variant == 4 and first >= second:
            question = f"[What is {first} minus {second}|{first} - {second}|What is {first} - {second}]?"
            return self.fill(question), f"{first} minus {second} is {first - second}."
        question = (
            f"[What is {first} plus {second}|{first}+{second}|What is {first} + {second}"
            f"|How much is {first} and {second}|What's {first}+{second}|{first} + {second} =]?"
        )
        return self.fill(question), f"{first} plus {second} is {first + second}."

    def unknown(self) -> tuple[str, str]:
        """A question that the model cannot answer, and how it says so."""
        rng = self.rng
        slots = {
            key: " ".join(self.noise_word() for _ in range(rng.randint(1, 3))) for key in ("x", "y", "x2")
        }
        question = self.fill(rng.choice(w.UNKNOWN_QUESTIONS), slots)
        if self.chance(0.1):
            question = rng.choice(w.ODD_TEXTS)
        return question, self.fill(rng.choice(w.UNKNOWN_ANSWERS))

    def fact(self) -> tuple[str, str]:
        """A question with a fixed answer."""
        patterns, answers = self.rng.choice(w.FACTS)
        return self.fill(patterns), self.fill(self.rng.choice(answers))

    def amusement(self) -> tuple[str, str]:
        """A joke or a poem."""
        if self.chance(0.5):
            question = "[Tell me a joke|Do you know a joke|Make me laugh|A joke, please|Another joke]"
            return self.fill(question + "[.|!|?|]"), self.rng.choice(w.JOKES)
        slots = self.misc_slots()
        question = "[Write a poem|Tell me a poem|Write a short poem|A poem, please|Sing a song]"
        about = f" about {article(slots['kind'])}" if self.chance(0.5) else ""
        pattern = self.rng.choice([p for p in w.POEMS if "{kind}" in p])
        return self.fill(question) + about + self.fill("[.|!|]"), capitalize(self.fill(pattern, slots))

    def exchange(self) -> tuple[str, str]:
        """A random question with its answer."""
        kinds: list[Callable[[], tuple[str, str]]] = [
            self.story_request,
            self.fact,
            self.animal_fact,
            self.simple_fact,
            self.unknown,
            self.amusement,
        ]
        question, answer = self.rng.choices(kinds, weights=[30, 34, 9, 7, 16, 4])[0]()
        style = self.rng.random()
        if style < 0.15:
            question = question.lower()
        elif style < 0.25:
            question = question.rstrip("?.!")
        elif style < 0.3:
            question = question.lower().rstrip("?.!")
        elif style < 0.33:
            question = f"Please, {question[0].lower()}{question[1:]}"
        elif style < 0.36:
            question = f"Hello! {question}"
        return question, answer

    # -- noise -----------------------------------------------------------------------------------

    def noise_word(self) -> str:
        """A word that the stories do not use, or no word at all."""
        roll = self.rng.random()
        if roll < 0.75:
            word = self.rng.choice(w.OTHER_WORDS)
            return word + self.rng.choice(["", "", "", "", "s", "ing", "ed", "er", "ly"])
        if roll < 0.83:
            return self.invented_name().lower()
        if roll < 0.9:
            return str(self.rng.randrange(10 ** self.rng.randint(1, 5)))
        if roll < 0.96:
            letters = "abcdefghijklmnopqrstuvwxyz"
            return "".join(self.rng.choices(letters, k=self.rng.randint(2, 9)))
        return "".join(chr(self.rng.choice([*range(33, 127), *range(0xC0, 0x250)])) for _ in "1234")

    def noise(self) -> str:
        """Some text of a kind that the model does not know."""
        rng = self.rng
        if self.chance(0.15):
            return rng.choice(w.ODD_TEXTS)
        if self.chance(0.4):
            slots = {key: " ".join(self.noise_word() for _ in range(rng.randint(1, 2))) for key in "xy"}
            return self.fill(rng.choice(w.UNKNOWN_TEXTS), slots)
        count = rng.randint(1, 14)
        chosen = [rng.choice(w.GLUE_WORDS) if self.chance(0.4) else self.noise_word() for _ in range(count)]
        text = " ".join(chosen)
        return text[0].upper() + text[1:] if self.chance(0.7) else text

    # -- documents -------------------------------------------------------------------------------

    def plain(self) -> Document:
        """A story, a scene or a poem."""
        roll = self.rng.random()
        if roll < 0.75:
            return [(self.story(), True)]
        if roll < 0.86:
            return [(f"{self.scene()} {self.story()}", True)]
        if roll < 0.98:
            return [(self.scene(), True)]
        return [(self.poem(), True)]

    def plain_answer(self) -> Document:
        """A question and its answer without the chat markers."""
        question, answer = self.exchange()
        if self.chance(0.3):
            return [(f"Question: {question}\nAnswer: ", False), (answer, True)]
        return [(question, False), (self.rng.choice([" ", "\n", "\n\n"]) + answer, True)]

    def after_noise(self) -> Document:
        """Unknown text, and how the model gets from there to a story."""
        text = self.noise()
        if self.chance(0.25):
            text = f"{self.scene()} {text}"
        if text.endswith((" is", " was", " are")) and self.chance(0.7):
            bridge = " something that a small demo model does not know. Here is a story instead.\n\n"
        elif text.endswith((".", "?", "!")):
            bridge = self.rng.choice(["\n\n", " "])
        else:
            bridge = self.rng.choice(w.BRIDGES)
        return [(text, False), (bridge + self.story(), True)]

    def chat(self) -> Document:
        """A chat of one or more turns, with or without a system prompt."""
        rng = self.rng
        document: Document = []
        if self.chance(0.35):
            system = rng.choice(w.SYSTEMS) if self.chance(0.8) else self.noise()
            document.append((f"{IM_START}system\n{system}{IM_END}\n", False))
        turns = [self.exchange() for _ in range(rng.choices([1, 2, 3, 5], weights=[60, 22, 12, 6])[0])]
        if self.chance(0.12):
            name = self.name(self.chance(0.5))
            said = self.fill("[My name is|I am|I'm|Hello, my name is|Hi, I am] {n}[.|!|]", {"n": name})
            greeting = self.fill(
                "[Hello, {n}!|Nice to meet you, {n}!] I am the QMesh demo model. "
                "Would you like to hear a story?",
                {"n": name},
            )
            question = self.fill("[What is my name|Do you know my name|What's my name|Who am I]?")
            turns.insert(0, (said, greeting))
            turns.append((question, f"Your name is {name}."))
        elif self.chance(0.03):
            turns.append(
                (
                    self.fill("[What is my name|Do you know my name]?"),
                    "I do not know your name. You have not told me yet.",
                )
            )
        for question, answer in turns:
            document.append((f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n", False))
            document.append((f"{answer}{IM_END}", True))
            document.append(("\n", False))
        return document

    def collection(self) -> Document:
        """Many stories in one document, as needed when the end token is not allowed."""
        document: Document = []
        if self.chance(0.5):
            question, answer = self.exchange()
            document.append((f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n", False))
            document.append((answer + "\n\n", True))
        count = self.rng.randint(3, 18)
        texts = [self.story() if self.chance(0.9) else self.scene() for _ in range(count)]
        document.append(("\n\n".join(texts), True))
        return document

    def document(self) -> Document:
        """One random document, with its end token."""
        kinds: list[Callable[[], Document]] = [
            self.plain,
            self.plain_answer,
            self.after_noise,
            self.chat,
            self.collection,
        ]
        document = self.rng.choices(kinds, weights=[36, 12, 8, 43, 1])[0]()
        return [*document, (END_OF_TEXT, True)]


def documents(seed: int, count: int) -> Iterator[Document]:
    """``count`` documents from a seed."""
    writer = Writer(seed)
    for _ in range(count):
        yield writer.document()


def main() -> None:
    """Write the documents as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--documents", type=int, default=120_000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with arguments.out.open("w", encoding="utf-8") as file:
        for document in documents(arguments.seed, arguments.documents):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
