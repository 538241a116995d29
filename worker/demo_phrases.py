"""What people ask the demo model, and what it says of itself."""

from __future__ import annotations

COUNT_QUESTIONS = (
    *["Count from {a} to {b}."] * 6,
    "Count from {a} to {b}",
    "count from {a} to {b}",
    "Please count from {a} to {b}.",
    "Please count from {a} to {b}!",
    "Can you count from {a} to {b}?",
    "Count up from {a} to {b}.",
    "Count from {a} up to {b}.",
    "Write the numbers from {a} to {b}.",
    "List the numbers {a} to {b}.",
    "Say all numbers from {a} to {b}, please.",
)
SHORT_COUNT_QUESTIONS = (
    "Count to {b}.",
    "count to {b}",
    "Count up to {b}.",
    "Can you count to {b}?",
)

INVITATION = "Ask me to count from 1 to 100, or show me an image of one colour."
TALK: dict[str, tuple[tuple[str, ...], str, str]] = {
    "hello": (
        (
            "Hello",
            "Hi",
            "Hey",
            "Hello there",
            "Hi there",
            "Good morning",
            "Good evening",
            "Hello you",
        ),
        "The user greets me. I greet back.",
        f"Hello! I am a tiny demo model. {INVITATION}",
    ),
    "who": (
        (
            "Who are you",
            "What are you",
            "What is your name",
            "Which model are you",
            "Hello, who are you",
            "Hello there, who are you",
            "Hi, what are you",
            "Tell me who you are",
            "Are you a real model",
            "Introduce yourself",
        ),
        "The user asks who I am.",
        (
            "I am the demo model of Unbroken: a tiny Qwen3-VL, trained on this machine when it "
            "was installed. I know very little, but I count without a slip."
        ),
    ),
    "what": (
        (
            "What can you do",
            "What do you know",
            "How can you help me",
            "Help",
            "Help me",
            "What are you good at",
            "What can I ask you",
            "Hello, what can you do",
            "Can you help me",
            "What are you able to do",
        ),
        "The user asks what I can do.",
        (
            "This is a demo. I can count up to 200, and I can name the colour of plain images and "
            "of the scenes of a video. For anything else, run a real model."
        ),
    ),
    "thanks": (
        ("Thank you", "Thanks", "Thanks a lot", "Thank you very much", "Great, thanks"),
        "The user thanks me.",
        "You are welcome!",
    ),
    "nothing to see": (
        (
            "What colour is this image",
            "What color is this picture",
            "What is in this picture",
            "What do you see",
            "What colour is it",
            "Describe the image",
            "Describe the video",
            "What happens in this video",
        ),
        "There is no image here.",
        "I see no image and no video. Send me one of plain colours.",
    ),
}
UNKNOWN = (
    "I do not know this.",
    f"I am only a tiny demo model, and I do not know that. {INVITATION}",
)
ODD_QUESTIONS = (
    "What is the capital of {w}",
    "Write a poem about {w}",
    "Tell me a story about {w}",
    "Tell me a long story",
    "Tell me about {w} and {v}",
    "Explain {w}",
    "Why is {w} {v}",
    "Why",
    "How does {w} work",
    "How many {w} are there",
    "Who is {w}",
    "Where is {w}",
    "What is {w}",
    "Translate {w} to {v}",
    "Write a program that sorts {w}",
    "What is {n} plus {m}",
    "Is {w} better than {v}",
    "Give me {n} {w} for {v}",
    "{w} {v}",
    "{w}",
    "One and two",
    "Write a short story about the {w} and the {v} and the {w}",
)
WORDS = (
    "France",
    "Japan",
    "weather",
    "water",
    "people",
    "music",
    "love",
    "house",
    "world",
    "time",
    "year",
    "day",
    "school",
    "book",
    "dogs",
    "cats",
    "money",
    "food",
    "history",
    "science",
    "physics",
    "computer",
    "language",
    "Python",
    "letters",
    "Paris",
    "London",
    "moon",
    "sun",
    "sea",
    "tree",
    "car",
    "train",
    "city",
    "country",
    "king",
    "friend",
    "family",
    "game",
    "health",
    "art",
    "film",
    "summer",
    "winter",
)

IMAGE_QUESTIONS = (
    *["What colour is this image?"] * 4,
    "What color is this image?",
    "What colour is it?",
    "What is this?",
    "What do you see?",
    "What is in this picture?",
    "What colour is this picture?",
    "Describe the image.",
    "Which colour is this",
    "",
)
IMAGES_QUESTIONS = (
    *["What colours are these images?"] * 3,
    "What colour is this image?",
    "What colours are they?",
    "Name the colours in order.",
    "What do you see?",
    "Compare these images.",
    "Which colours do these two images have?",
    "",
)
VIDEO_QUESTIONS = (
    *["What colours does this video show?"] * 3,
    "What happens in this video?",
    "Describe the video.",
    "What do you see?",
    "Which colours come in which order?",
    "What colour is this video?",
    "",
)
