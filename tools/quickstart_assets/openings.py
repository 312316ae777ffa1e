"""Places, times and sentence templates of the prompts (slots as in ``stories``, with ``{job}`` and ``{look}``)."""

from typing import Final

from tools.quickstart_assets.stories import lines

PLACES: Final[dict[str, str]] = {
    "mill": "behind the old mill",
    "bridge": "under the stone bridge",
    "well": "beside the village well",
    "barn": "near the empty barn",
    "orchard": "at the edge of the orchard",
    "harbor": "down at the harbor",
    "chapel": "on the steps of the chapel",
    "inn": "outside the crowded inn",
    "lighthouse": "near the lighthouse",
    "schoolhouse": "behind the schoolhouse",
    "castle": "at the gate of the castle",
    "fountain": "close to the fountain",
    "tower": "below the tall tower",
    "pond": "next to the duck pond",
    "river": "along the river",
    "garden": "in a corner of the garden",
    "forge": "beside the forge",
    "library": "at the door of the library",
    "stable": "behind the stable",
    "station": "at the train station",
}
TIMES: Final = lines("""
    One cold morning
    On a rainy evening
    Late one night
    Early in the spring
    On market day
    After the harvest
    Before sunrise
    One summer afternoon
    On the first day of winter
    Just after lunch
    During a long storm
    In the middle of the week
    On a quiet Sunday
    One foggy autumn day
""")
SCENES: Final = lines("""
    Nobody else was near.
    The air smelled of smoke.
    The sky was low and gray.
    A dog barked far away.
    The wind blew through the trees.
    It was almost time for supper.
    The road was empty.
    Dry leaves covered the ground.
    The sun was about to set.
    Some crickets were singing in the grass.
""")
OPENINGS: Final[dict[str, list[str]]] = {
    "animal": lines("""
        {n} the {job} found {a} {look} {o} {place}.
        {n} the {job} came upon {a} {look} {o} {place}.
        {n} the {job} spotted {a} {look} {o} {place}.
        {n} the {job} was walking home when {a} {look} {o} appeared {place}.
    """),
    "person": lines("""
        {n} the {job} met {a} {look} {o} {place}.
        {n} the {job} noticed {a} {look} {o} {place}.
        {a} {look} {o} was waiting {place} when {n} the {job} walked by.
        {a} {look} {o} stopped {n} the {job} {place}.
    """),
    "mend": lines("""
        {a} {look} {o} brought a broken {x} to {n} the {job}, who was resting {place}.
        {n} the {job} was sitting {place} when {a} {look} {o} came with a broken {x}.
        {a} {look} {o} with a broken {x} met {n} the {job} {place}.
    """),
}
