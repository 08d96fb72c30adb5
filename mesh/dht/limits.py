"""Caps and times of the DHT. Sizes in bytes, times in seconds."""

from __future__ import annotations

from typing import Final

BUCKET_SIZE: Final = 20
"""Kademlia's k: contacts per bucket, replicas of a record."""
PARALLEL: Final = 3
"""Kademlia's alpha: requests of one crawl in flight; one more for each contact that is slow."""
MAX_PARALLEL: Final = 16
MAX_CRAWL_REQUESTS: Final = 160
MAX_CANDIDATES: Final = 512
"""Contacts that one crawl remembers."""

REQUEST_TIMEOUT: Final = 1.0
SOFT_TIMEOUT: Final = 0.25
"""After this long a crawl goes on without waiting for the contact; a late answer still counts."""
CRAWL_DEADLINE: Final = 5.0
LOOKUP_DEADLINE: Final = 6.0
MAX_PAGES: Final = 16
"""Rounds of requests for further records of one key."""
MAX_BARREN_PAGES: Final = 6
"""In a row that bring nothing new."""
MAX_SHARDS_TRIED: Final = 6
MAX_DEPTH_HINTS: Final = 256
CATALOGUE_INTERVAL: Final = 90.0
MAX_CATALOGUE_INTERVAL: Final = 900.0
CATALOGUE_GROWN: Final = 32
CATALOGUE_CROWDED: Final = 48
"""From so many listings on readers look into the shards of the catalogue too, and models are listed there."""
CATALOGUE_FRESH: Final = 30.0
MAX_MODELS_SIZE: Final = 60 << 10
MODEL_SIZE: Final = 32
"""An answer about models: in all, and for each model besides its name, so that there are not too many either."""
CATALOGUE_LOOKS: Final = 8
"""About how many of a model's workers look in each interval whether it needs more listings."""
WITHDRAWN_LIFETIME: Final = 60.0
WITHDRAW_DEADLINE: Final = 1.5
RESOLVE_DEADLINE: Final = 5.0

MIN_REQUEST: Final = 29
LEAST_SIZES: Final = {"ping": 80, "find_node": 400, "find_value": 400}
"""Requests without a token are padded to this, so that the whole answer is within three times as much."""
MAX_PENDING: Final = 4096
MAX_VERIFYING: Final = 32
MAX_REMEMBERED_TOKENS: Final = 2048
MAX_REMEMBERED_FAILURES: Final = 2048
FIRST_SILENCE: Final = 20.0
MAX_SILENCE: Final = 80.0
"""Walks leave out an address that did not answer: 20 s the first time, then 40, then 80."""

TOKEN_SIZE: Final = 8
TOKEN_ROTATION: Final = 300.0
"""A token is good for one to two rotations."""
TOKEN_REUSE: Final = 240.0

MAX_RECORDS: Final = 8192
MAX_RECORDS_PER_SUBNET: Final = 1024
MAX_RECORDS_PER_SUBNET_AND_KEY: Final = 16

MAX_CONTACTS_PER_SUBNET: Final = 2
"""In one bucket."""
MAX_FAILURES: Final = 2
MAX_SEEDS: Final = 64
MAX_REMEMBERED_CONTACTS: Final = 200

RESCUES_AT_ONCE: Final = 16
FIRST_BACKOFF: Final = 0.5
MAX_BACKOFF: Final = 20.0
LEAST_PAUSE: Final = 0.05
SEED_INTERVAL: Final = 20.0
CHECK_INTERVAL: Final = 15.0
CHECKS_AT_ONCE: Final = 4
STALE_CONTACT: Final = 300.0
FIRST_EXPLORE: Final = 1.0
MAX_EXPLORE_PAUSE: Final = 900.0
"""Neighbours and buckets are explored after 1, 2, 4, … s and then this often."""
SAVE_INTERVAL: Final = 300.0
