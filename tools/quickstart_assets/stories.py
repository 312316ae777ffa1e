"""Word lists and clause templates of the little stories (written for this project).

Slots: ``{n}`` the name, ``{s}`` she/he, ``{h}`` her/him, ``{p}`` her/his, ``{o}`` the animal or person that is met,
``{x}`` the broken thing, ``{spot}`` the place. A mood is +1 (warm), 0 (plain) or -1 (gloomy or unkind).
"""

from typing import Final

Moods = dict[int, list[str]]


def words(text: str) -> list[str]:
    """Splits a block of text into its words."""
    return text.split()


def lines(text: str) -> list[str]:
    """Splits a block of text into its lines, without their indentation."""
    return [line.strip() for line in text.strip().splitlines()]


HER_NAMES: Final = words("""Mara Elsa Nina Ruth Clara Ivy Tessa Greta Lucy Hanna Edith Rosa Vera Alma Nora Freya
    Jane Olga Sonia Petra""")
HIS_NAMES: Final = words("""Tom Otto Felix Hugo Karl Peter Simon Oscar Victor Leo Max Albert Henry Jonas Emil Boris
    Frank Martin Dennis Arthur""")
JOBS: Final = words("""baker miller farmer tailor potter weaver fisher carpenter gardener teacher blacksmith painter
    doctor clerk beekeeper cook librarian barber printer butcher cobbler nurse clockmaker singer""")

ANIMALS: Final = words("""kitten puppy lamb piglet fox rabbit squirrel hedgehog otter duckling owl sparrow crow goat
    hare mole badger tortoise swan pigeon""")
PERSONS: Final = words("""child boy girl stranger traveler beggar widow sailor soldier pilgrim peddler shepherd orphan
    fiddler monk student woodcutter juggler hunter scholar""")
THINGS: Final = words("""clock lantern kettle chair fiddle basket mirror umbrella wheel teapot doll ladder drum
    bucket wagon flute bench""")
ANIMAL_LOOKS: Final = words("wet tiny lost shivering hungry muddy lame sleepy spotted gray brown thin young wounded")
PERSON_LOOKS: Final = words("lost tired hungry shy barefoot lonely pale young quiet cold weary ragged tall polite")

LEADS: Final = ["At once", "After a moment", "Without a pause", "This time"]
ACTS: Final[dict[str, Moods]] = {
    "animal": {
        1: lines("""
            wrapped the {o} in {p} warm scarf
            gave the {o} fresh water and a soft bed of straw
            lifted the {o} gently and whispered kind words
            shared half of {p} bread with the {o}
            knelt down and stroked the {o} with great care
            built a snug little nest for the {o}
            sheltered the {o} under {p} cloak
            sat beside the {o} and sang a tender song
        """),
        0: lines("""
            looked at the {o} for a while
            stopped near the {o} and waited
            wrote a line about the {o} in a notebook
            sat down on a log not far from the {o}
            walked around the {o} twice
            wondered where the {o} had come from
            leaned on a fence and watched the {o}
            set down {p} basket and studied the {o}
        """),
        -1: lines("""
            shouted at the {o} and stamped {p} foot
            poked the {o} with a sharp stick
            kicked mud at the {o} and laughed
            called the {o} an ugly pest
            splashed icy water on the {o}
            threw a stone at the {o}
            pushed the {o} into a wet ditch
            mocked the {o} in a cruel voice
        """),
    },
    "person": {
        1: lines("""
            gave the {o} a bowl of hot soup
            took the {o} by the hand and smiled
            offered the {o} a warm bed for the night
            listened to the {o} with a patient heart
            put {p} own coat around the {o}
            shared bread and honey with the {o}
            told the {o} a cheerful joke
            welcomed the {o} like family
        """),
        0: lines("""
            nodded to the {o} and said good day
            asked the {o} about the road
            talked with the {o} about the weather
            stood beside the {o} and looked at the sky
            waited for the {o} to speak
            told the {o} {p} name
            sat down across from the {o}
            showed the {o} an old map
        """),
        -1: lines("""
            laughed in the face of the {o}
            stole the last coin of the {o}
            told the {o} to go away and never return
            lied to the {o} with a cold smile
            pushed the {o} into the mud
            insulted the {o} in front of everyone
            spat at the feet of the {o}
            cheated the {o} out of a meal
        """),
    },
    "mend": {
        1: lines("""
            mended the {x} with great care
            fixed the {x} and asked for no money
            polished the {x} until it shone
            worked on the {x} with a cheerful heart
            gave the {o} a better {x} as a gift
            promised to make the {x} as good as new
            praised the {x} and set to work with a smile
            made the {x} lovely again with gold paint
        """),
        0: lines("""
            set the {x} on a flat stone and looked at it
            turned the {x} around in {p} hands
            asked how old the {x} was
            put the {x} in a bag for later
            measured the {x} with a piece of string
            lifted the {x} with one hand
            drew a picture of the {x} in the dust
            tapped the {x} and listened
        """),
        -1: lines("""
            dropped the {x} on purpose and laughed
            broke the {x} into even smaller pieces
            called the {x} worthless junk
            threw the {x} into the mud
            demanded a cruel price for the {x}
            mocked the {o} for owning such an ugly {x}
            spat on the {x} and kicked it away
            cursed the {x} and refused to help
        """),
    },
}

_PEOPLE_REPLY: Final[Moods] = {
    1: lines("""
        the {o} thanked {h} with a warm smile
        the {o} hugged {h} tightly
        the {o} laughed and offered {h} a sweet apple
        the {o} promised to be a true friend
        the {o} sang {h} a lovely song
        the {o} wished {h} a happy life
        the {o} spoke only gentle words
        the {o} gave {h} a bunch of flowers
    """),
    0: lines("""
        the {o} nodded and said little
        the {o} looked down at the ground
        the {o} asked what day it was
        the {o} pointed toward the {spot}
        the {o} tied a loose bootlace
        the {o} thought about it for a while
        the {o} answered in a plain voice
        the {o} picked up a small pebble
    """),
    -1: lines("""
        the {o} burst into bitter tears
        the {o} cursed {h} and walked off
        the {o} struck {h} with a fist
        the {o} called {h} a filthy liar
        the {o} turned pale with fear
        the {o} swore to take revenge
        the {o} gave {h} a hateful look
        the {o} crept away in shame
    """),
}
REPLIES: Final[dict[str, Moods]] = {
    "animal": {
        1: lines("""
            the {o} nestled close and felt safe
            the {o} followed {h} like an old friend
            the {o} ate happily from {p} hand
            the {o} jumped about with joy
            the {o} rested its head on {p} knee
            the {o} made a small, glad sound
            the {o} looked up with bright, trusting eyes
            the {o} fell asleep in {p} lap
        """),
        0: lines("""
            the {o} blinked and looked around
            the {o} turned toward the {spot}
            the {o} sat still for a time
            the {o} sniffed the air
            the {o} shook itself once
            the {o} walked in a slow circle
            the {o} tilted its head
            the {o} stayed where it was
        """),
        -1: lines("""
            the {o} trembled with fear
            the {o} cried out in pain
            the {o} hid and would not come near
            the {o} bit {p} hand and ran off
            the {o} limped away into the cold
            the {o} lay down and whimpered
            the {o} shrank back in terror
            the {o} wailed in misery
        """),
    },
    "person": _PEOPLE_REPLY,
    "mend": _PEOPLE_REPLY,
}
