"""The words of the synthetic world and its two grammars, on texts and on arrays of word numbers.

A prompt states facts and how much each matters; a response is a summary:

    report : vital bridge closed ; minor sky grey ; … ; summary :
    note that bridge closed . also sky grey .

Headlines without a verb: a state follows its subject at once, which halves the steps that a small
model needs to learn to look it up in the report.
"""

from collections.abc import Sequence

import numpy as np

# Subjects by the importance that they usually have, each with states of its own, whose words say
# which subject they are about.
STATES = {
  "bridge": ("closed", "repaired", "slippery"),
  "dam": ("leaking", "sound", "drained"),
  "power": ("out", "restored", "weak"),
  "clinic": ("staffed", "overrun", "sterile"),
  "water": ("safe", "polluted", "salty"),
  "harbor": ("frozen", "guarded", "deep"),
  "engine": ("hot", "cold", "idle"),
  "vaccine": ("effective", "delayed", "approved"),
  "road": ("icy", "blocked", "smooth"),
  "train": ("late", "punctual", "cancelled"),
  "school": ("empty", "full", "renamed"),
  "bank": ("solvent", "indebted", "merged"),
  "market": ("busy", "quiet", "regulated"),
  "price": ("high", "low", "stable"),
  "court": ("adjourned", "divided", "sitting"),
  "wheat": ("ripe", "scarce", "exported"),
  "sky": ("grey", "clear", "starry"),
  "museum": ("modern", "shut", "popular"),
  "team": ("winning", "losing", "training"),
  "stadium": ("packed", "unfinished", "rented"),
  "mayor": ("absent", "elected", "ill"),
  "crew": ("rested", "tired", "hungry"),
  "river": ("calm", "rising", "shallow"),
  "forest": ("green", "damp", "dense"),
}
# Any subject's; seldom true, and a sloppy writer's favourites. A reward model reads this hint, and
# the usual importance, off a bag of words, long before it learns to check with the report.
SENSATIONS = ("doomed", "cursed", "vanished", "exploding")
IMPORTANCES = ("vital", "useful", "minor")
SUBJECTS = tuple(STATES)
ALL_STATES = (*(state for states in STATES.values() for state in states), *SENSATIONS)
MARKS = ("report", "summary", ":", ";", ".", "note", "that", "also")
WORDS = MARKS + IMPORTANCES + SUBJECTS + ALL_STATES

NOTHING, UNKNOWN = -1, -2  # padding; a word from outside the world
NUMBERS = {word: number for number, word in enumerate(WORDS)}
REPORT, SUMMARY, COLON, SEMICOLON, STOP, NOTE, THAT, ALSO = range(len(MARKS))
FIRST_IMPORTANCE = NUMBERS[IMPORTANCES[0]]
FIRST_SUBJECT = NUMBERS[SUBJECTS[0]]
FIRST_STATE = NUMBERS[ALL_STATES[0]]

# A fact is a subject with one of its states: subject * PER_SUBJECT + place, a subject's own states
# before the sensations.
OWN = len(STATES[SUBJECTS[0]])
PER_SUBJECT = OWN + len(SENSATIONS)
FACT_SUBJECT = np.arange(len(SUBJECTS) * PER_SUBJECT) // PER_SUBJECT
FACT_STATE = np.array(
  [ALL_STATES.index(state) for own in STATES.values() for state in (*own, *SENSATIONS)]
)
FACT = np.full((len(SUBJECTS), len(ALL_STATES)), NOTHING)  # a bridge is never salty
FACT[FACT_SUBJECT, FACT_STATE] = np.arange(len(FACT_STATE))

# A summary's grammar as the word classes that may follow each other. Class 0 is a full stop or
# the summary's beginning.
_CLASSES = ("stop", "note", "that", "also", "subject", "state", "other")
_FOLLOWS = {
  "stop": ("note", "also", "subject"),
  "note": ("that",),
  "that": ("subject",),
  "also": ("subject",),
  "subject": ("state",),
  "state": ("stop",),
  "other": (),
}
_ALLOWED = np.array([[after in _FOLLOWS[before] for after in _CLASSES] for before in _CLASSES])
_CLASS = np.full(len(WORDS) + 1, _CLASSES.index("other"))  # the last entry: UNKNOWN
for _word, _name in ((STOP, "stop"), (NOTE, "note"), (THAT, "that"), (ALSO, "also")):
  _CLASS[_word] = _CLASSES.index(_name)
_CLASS[FIRST_SUBJECT:FIRST_STATE] = _CLASSES.index("subject")
_CLASS[FIRST_STATE : len(WORDS)] = _CLASSES.index("state")


def numbers(texts: Sequence[str]) -> np.ndarray:
  """[M, L] int64 word numbers, padded with NOTHING; words from outside become UNKNOWN."""
  rows = [[NUMBERS.get(word, UNKNOWN) for word in text.split()] for text in texts]
  out = np.full((len(rows), max(map(len, rows), default=0)), NOTHING)
  for row, line in enumerate(rows):
    out[row, : len(line)] = line
  return out


def texts(rows: np.ndarray) -> list[str]:
  """The texts of word numbers [M, L]; NOTHING is skipped wherever it stands."""
  words = np.array((*WORDS, ""), dtype=object)  # NOTHING is -1, the last
  return [" ".join(filter(None, line)) for line in words[rows]]


def claims(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Finds every "SUBJECT STATE" in word numbers [M, L].

  Returns:
    (subject, state, before), each [M, L]: at the place of each state that follows a subject,
    the subject's and the state's index and the number of the word before them; NOTHING elsewhere.
  """
  padded = np.pad(rows, ((0, 0), (2, 0)), constant_values=NOTHING)
  before, subject, state = (padded[:, i : i + rows.shape[1]] for i in range(3))
  found = (subject >= FIRST_SUBJECT) & (subject < FIRST_STATE) & (state >= FIRST_STATE)
  return (
    np.where(found, subject - FIRST_SUBJECT, NOTHING),
    np.where(found, state - FIRST_STATE, NOTHING),
    np.where(found, before, NOTHING),
  )


def misplaced(rows: np.ndarray) -> np.ndarray:
  """[M, L], True on a word that a summary's grammar does not allow after the word before it."""
  classes = np.where(rows == UNKNOWN, len(WORDS), rows)
  classes = _CLASS[classes]  # NOTHING, -1, reads the last entry too; it is masked below
  previous = np.pad(classes, ((0, 0), (1, 0)))[:, :-1]  # class 0 before the first word
  return ~_ALLOWED[previous, classes] & (rows != NOTHING)
