"""The kit's own texts: prompts, strings for the tokenizer, conversations, and texts to parse."""

from typing import Any

from conformance.cases import Chat, Message, Parse

PASSAGES = (
    "The tide went out before sunrise, and the two sisters walked along the wet sand with a lamp and a basket. "
    "They counted 17 shells, 4 crabs and 1 bottle. The older one wrote each find into a small book, with the hour and the place. ",
    "A ferry leaves the harbour at 6:40, 9:15 and 12:05. Each trip takes 35 minutes, so the last one returns at 13:15. "
    "On Sundays there is no boat before noon, and the bridge is closed when the wind is above 80 kilometres an hour. ",
    "def area(width, height):\n    return width * height\n\nfor side in range(3, 9):\n    print(side, area(side, side + 1))\n",
    "To bake the bread, mix 500 grams of flour with 320 grams of water, 10 grams of salt and a little yeast. "
    "Let it rest for twelve hours; then fold it, wait for one hour more, and bake it at 230 degrees until it is brown. ",
    "Le pont est fermé le lundi. El tren sale a las ocho y media. Der Markt beginnt um sieben Uhr. Il museo apre alle dieci. ",
)  # fmt: skip
LONG = "".join(PASSAGES) * 3
SINGLE = ("a", "Z", "7", ".", "(", "e", "B", "0")
PROMPTS = (
    "The ferry leaves the harbour at",
    "for side in range(3, 9):\n    print(",
    "They counted 17 shells, 4 crabs and",
    "Le pont est fermé le lundi. El tren sale a",
    "Mix 500 grams of flour with 320 grams of water, and 10 grams of",
    "The older one wrote each find into a small book, with the hour",
)
SAMPLES = (
    "The year 2025 has 365 days; 1,234,567.89 is a number, and so is 0x1F.",
    "don't, we'll, I'M, they've, it's 5 o'clock",
    "two  spaces,   three, a\ttab, and a line\n\n\nand another\r\n  end  ",
    "L'été, où l'œuvre naïve; señor, ¿qué tal?; Straße, Übung; città, perché; ação, não",
    "Быстрая лиса. Η γρήγορη αλεπού. 快速的狐狸跳过了懒狗。素早い狐。빠른 여우. الثعلب السريع. तेज़ लोमड़ी. จิ้งจอก",  # noqa: RUF001
    "def f(x: int) -> int:\n\treturn x ** 2 - 3*x + 1  # comment\n\n{'a': [1, 2], \"b\": None}",
    "🙂👩‍🚀🇫🇷 e\u0301 ﬁ ½ ² Ⅷ",
    "<p class=\"x\">http://example.org/a?b=c&d=e#f</p> \\frac{1}{2} $x_i^2$ ~~~ -- --- ...",
)  # fmt: skip
DATE = "01 January 2025"


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """A function as an OpenAI-compatible server takes it; parameters are name and JSON type."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": value} for key, value in parameters.items()},
                "required": list(parameters),
            },
        },
    }


WEATHER = tool("get_weather", "The weather in a city.", city="string")
ADD = tool("add", "The sum of two numbers.", a="number", b="number")
SYSTEM = "You answer in one line."


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def chat(*messages: dict[str, Any], tools: Any = (), **variables: Any) -> Chat:
    return Chat(list(messages), {"date_string": DATE} | variables, list(tools))


# Case: what it shows, its chats.
CONVERSATIONS: dict[str, tuple[str, list[Chat]]] = {
    "template-modes": (
        "/think and /no_think, by enable_thinking and by the system message's flags",
        [
            chat(user("Hi"), enable_thinking=True),
            chat(user("Hi"), enable_thinking=False),
            chat(system(f"{SYSTEM} /no_think"), user("Hi"), enable_thinking=True),
            chat(system(f"{SYSTEM} /think"), user("Hi"), enable_thinking=False),
            chat(user("Hi /no_think"), enable_thinking=True),
        ],
    ),
    "template-system": (
        "own instructions, none, and /system_override",
        [
            chat(system(SYSTEM), user("Hi"), enable_thinking=False),
            chat(user("Hi"), enable_thinking=False, custom_instructions=SYSTEM),
            chat(system(f"{SYSTEM} /system_override"), user("Hi"), enable_thinking=False),
            chat(system("/no_think /system_override"), user("Hi")),
        ],
    ),
    "template-tools": (
        "functions as JSON and as Python",
        [
            chat(user("Hi"), tools=[WEATHER, ADD], enable_thinking=False),
            chat(system(SYSTEM), user("Hi"), tools=[WEATHER], enable_thinking=True),
            chat(user("Hi"), python_tools=["def add(a: float, b: float) -> float: ..."]),
        ],
    ),
    "template-turns": (
        "several turns: traces, calls and their results",
        [
            chat(user("Hi"), assistant("Hello."), user("And 2 plus 2?"), enable_thinking=False),
            chat(user("Hi"), assistant("<think>\nA greeting.\n</think>\nHello."), user("Bye"), enable_thinking=True),
            chat(
                user("Is it warm in Paris?"),
                {"role": "assistant", "content": "", "tool_calls": [
                    {"id": "call_1", "type": "function",
                     "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
                {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 21}'},
                tools=[WEATHER], enable_thinking=False,
            ),
        ],
    ),
}  # fmt: skip


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def parsings() -> list[Parse]:
    """Texts that a model may write, and what is to be made of each."""
    paris = ("get_weather", {"city": "Paris"})
    total = ("add", {"a": 2, "b": 3.5})
    rows = [
        ("parse-text", "an answer without tags", "It is 4.", Message(None, "It is 4.")),
        ("parse-think", "a trace and an answer", "<think>\n2 plus 2 is 4.\n</think>\nIt is 4.",
         Message("2 plus 2 is 4.", "It is 4.")),
        ("parse-call", "one call", call("get_weather", '{"city": "Paris"}'), Message(calls=[paris])),
        ("parse-calls", "a trace, a sentence and two calls",
         "<think>\nBoth.\n</think>\nI look.\n" + call("get_weather", '{"city": "Paris"}') + "\n"
         + call("add", '{"a": 2, "b": 3.5}'), Message("Both.", "I look.", [paris, total])),
        ("parse-nested", "arguments that spell tags, quotes and braces",
         call("note", '{"text": "a } \\"b\\" {", "list": [1, {"x": null}]}'),
         Message(calls=[("note", {"text": 'a } "b" {', "list": [1, {"x": None}]})])),
    ]  # fmt: skip
    return [Parse(*row) for row in rows]


# What the kit's model is made to answer: case, what it shows, chat, text, its parts.
ANSWERS: list[tuple[str, str, Chat, str, Message]] = [
    (
        "answer-think",
        "a trace, an answer and the end of the turn, in /think",
        chat(user("What is 2 plus 2?"), enable_thinking=True),
        "<think>\n2 plus 2 is 4.\n</think>\nIt is 4.",
        Message("2 plus 2 is 4.", "It is 4."),
    ),
    (
        "answer-no-think",
        "an answer without a trace, in /no_think",
        chat(user("What is 2 plus 2?"), enable_thinking=False),
        "4, as ever.",
        Message(None, "4, as ever."),
    ),
    (
        "answer-call",
        "a tool call, in /no_think",
        chat(user("Is it warm in Paris?"), tools=[WEATHER], enable_thinking=False),
        call("get_weather", '{"city": "Paris"}'),
        Message(calls=[("get_weather", {"city": "Paris"})]),
    ),
]
