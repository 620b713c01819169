"""What a haystack's question asks for: a digit, a number of three digits, a name, or a sentence with a number.

===========  =================================  =============================  ==================================
answer       what the picture holds             grounding, video               documents, pages
===========  =================================  =============================  ==================================
``digit``    one digit in every frame or line   ``7``                          ``7``
``number``   three digits, a cell each          ``417``                        ``417``
``name``     the same                           ``red`` (the frame of 417)     ``Anna`` (who scored 417)
``sentence`` the same                           ``The red number is 417``      ``Anna scored 417``
===========  =================================  =============================  ==================================

All but the first are several tokens long for most tokenizers, and each token has its own evidence: a digit its cell,
a name the place where it is written. Nothing here draws pixels or depends on tokens.
"""

from mech.errors import InputError, suggestion

ANSWERS = ("digit", "number", "name", "sentence")
QUESTIONS = {
    "digit": {
        "grounding": (
            "Which digit is in the {key} frame?",
            "What number does the {key} frame hold?",
            "Look at the {key} frame. Which digit is it?",
        ),
        "documents": (
            "What did {key} score?",
            "Which score does {key} have?",
            "Read the line of {key}. What is the score?",
        ),
        "pages": (
            "On these pages, what did {key} score?",
            "Which score does {key} have in these pages?",
            "Find the page of {key}. What is the score?",
        ),
        "video": (
            "Which digit appears in the {key} frame?",
            "What number does the {key} frame show in the video?",
            "Watch for the {key} frame. Which digit is it?",
        ),
    },
    "name": {
        "grounding": ("Which colour is the frame of {number}?", "Look for {number}. Which colour is its frame?"),
        "documents": ("Who scored {number}?", "Look for the score {number}. Whose is it?"),
        "pages": ("On these pages, who scored {number}?", "Find the page with {number}. Whose score is it?"),
        "video": ("Which colour is the frame of {number}?", "Watch for {number}. Which colour is its frame?"),
    },
    "sentence": {
        "grounding": ("Say in a sentence which number is in the {key} frame.",),
        "documents": ("Say in a sentence what {key} scored.",),
        "pages": ("Say in a sentence what {key} scored on these pages.",),
        "video": ("Say in a sentence which number appears in the {key} frame.",),
    },
}
QUESTIONS["number"] = {
    domain: tuple(question.replace("digit", "number") for question in questions)
    for domain, questions in QUESTIONS["digit"].items()
}
_FRAMED, _LINE = "The {key} number is {number}", "{key} scored {number}"
SENTENCES = {"grounding": _FRAMED, "documents": _LINE, "pages": _LINE, "video": _FRAMED}


def digits_of(answer: str) -> int:
    """How many digits every frame or line of a scene holds for this kind of answer.

    Raises:
        InputError: no such kind of answer.
    """
    if answer not in ANSWERS:
        raise InputError(f"answer={answer!r}", ", ".join(ANSWERS), suggestion(answer, ANSWERS))
    return 1 if answer == "digit" else 3


def answer_to(answer: str, domain: str, key: str, number: str) -> str:
    """The words of the answer about ``key``, whose digits are ``number``."""
    if answer == "sentence":
        return SENTENCES[domain].format(key=key, number=number)
    return key if answer == "name" else number
