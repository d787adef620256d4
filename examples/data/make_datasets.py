"""Write the demo's three datasets: `python examples/data/make_datasets.py`, always the same bytes.

Each task keeps phrases for its test set that no training example uses, so that the test asks for more than
remembering: problems and urgencies of tickets, ways to order and sets of dishes, products and opinions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "client/hotswap_client/cli/demo/data"
NUM_TRAIN, NUM_TEST = 120, 24
SEED = 7
Row = tuple[str, str]
"""What is asked, and the right answer."""

# The first ten problems of a queue are trained on, the last four are for the test.
PROBLEMS = {
    "billing": """
        I was charged twice for the same month.
        The invoice for March shows the wrong VAT number.
        My refund has still not reached my bank account.
        You billed my old credit card again.
        The discount code was not taken off the total.
        Why did the price of my plan go up?
        I need a receipt for last year's payments.
        The bill lists five seats, but we only pay for three.
        My payment failed and now I owe a late fee.
        Can I pay by bank transfer instead of card?
        There is a charge on my statement that I never agreed to.
        Our invoice has the wrong company name on it.
        I cancelled in May and still paid for June.
        Please send the receipt for order 4471 again.""",
    "shipping": """
        My parcel has been stuck in Leipzig for nine days.
        The courier left the box at the wrong house.
        Tracking says delivered, but nothing arrived.
        Half of the boxes from my order are missing.
        Can you change the delivery address to my office?
        The package came with a crushed corner.
        Do you deliver to Norway?
        The driver never rang the bell and drove off.
        My order was sent to my old street.
        When will the blue lamp leave your warehouse?
        The parcel went back to you without any notice.
        Two weeks have passed and the courier has no trace of my box.
        Could the delivery come on Saturday instead?
        Somebody else signed for my package.""",
    "account": """
        I forgot my password and the reset mail never comes.
        Please change the email address I log in with.
        My login is locked after three wrong tries.
        How do I add a colleague as a second user?
        I lost the phone with my two-factor codes.
        Delete my profile and all of my personal data.
        I cannot sign in since I changed my name.
        My username is misspelled, can you correct it?
        Someone in another country has logged into my profile.
        I have two profiles and want to join them into one.
        The login page says that my user does not exist.
        A former employee still has access with her password.
        I want to change my username.
        The code for two-factor login is always refused.""",
    "technical": """
        The app crashes when I open the settings page.
        Exporting to PDF gives an empty file.
        The search box freezes the browser.
        Your API answers with error 500 on every call.
        Photos upload upside down from my phone.
        The dashboard is very slow since the update.
        Notifications no longer appear on Android.
        The calendar sync shows every event twice.
        The print button does nothing in Firefox.
        Dark mode makes the text unreadable.
        The app closes by itself after the newest update.
        The import of a CSV file stops with an error at row 300.
        Sound is missing in every video on my tablet.
        The page stays white after I press save.""",
}
# The first six of each are trained on, the last three are for the test.
URGENCY = {
    "high": """
        This is urgent!
        We need this fixed today.
        Our whole team is blocked.
        Please help immediately.
        I need an answer within the hour.
        This cannot wait until tomorrow.
        It is urgent, please hurry!
        We are blocked until this is fixed.
        Please fix this immediately, today if you can.""",
    "normal": """

        Thanks for your help.
        Kind regards, Tom
        Could you take a look?
        Hello from Madrid.
        Best, Aisha

        Many thanks, Lena
        Could you have a look, please?""",
    "low": """
        No rush at all.
        Whenever you have time.
        It is not important.
        No hurry, next week is fine.
        Just asking out of curiosity.
        This can wait.
        There is no hurry.
        It can wait until you have time.
        Not important, just curious.""",
}

DISHES = {
    "flat white": "flat whites",
    "espresso": "espressos",
    "cappuccino": "cappuccinos",
    "green tea": "green teas",
    "hot chocolate": "hot chocolates",
    "orange juice": "orange juices",
    "iced latte": "iced lattes",
    "croissant": "croissants",
    "cheese toast": "cheese toasts",
    "blueberry muffin": "blueberry muffins",
    "apple pie": "apple pies",
    "cinnamon roll": "cinnamon rolls",
    "banana bread": "banana breads",
    "bagel": "bagels",
    "tomato soup": "tomato soups",
    "lemon tart": "lemon tarts",
}
NUMBERS = {
    1: ["one", "a", "just one"],
    2: ["two", "a couple of", "2"],
    3: ["three", "3"],
    4: ["four", "4"],
    5: ["five"],
    6: ["six", "half a dozen"],
}
# The first ten are trained on, the last four are for the test.
ORDERING = """
    Hi, can I get {}, please?
    We would like {}.
    {} to go, thanks!
    Good morning! {} for table nine.
    I'll take {}.
    Could you make us {}?
    Hello, {} and the bill, please.
    My friend wants {}.
    For me {}, thank you.
    Table four is asking for {}.
    Hey there, could we have {}, please?
    I'd like {} to take away.
    Good evening, {} for the lady in the corner.
    {} for table two, please!"""

# The first twenty are trained on, the last ten are for the test.
PRODUCTS = """
    kettle, backpack, desk lamp, umbrella, tent, blender, office chair, phone case, alarm clock, frying pan,
    rain jacket, keyboard, headset, water bottle, coffee grinder, bicycle pump, yoga mat, wallet, hammock,
    electric razor, toaster, suitcase, sleeping bag, garden hose, camera, bookshelf, doormat, drill, sofa,
    wrist watch"""
# The first eight of each are trained on, the last four are for the test.
OPINIONS = {
    "treasure": """
        Best {} I have ever owned.
        I love this {} and use it every day.
        The {} is well made and worth every cent.
        Very happy with my new {}, it works perfectly.
        Bought the {} a year ago and it still looks brand new.
        What a wonderful {}! My sister wants one too.
        Great {} for a fair price, I would buy it again.
        The {} is even better than in the pictures.
        This {} is wonderful, I am very happy.
        A great {}, I would buy it again tomorrow.
        I love it: the {} works perfectly every day.
        My new {} is better than I hoped, five stars.""",
    "shark bait": """
        The {} broke after two days.
        Terrible {}, I want my money back.
        This {} is a waste of money.
        My {} arrived damaged and support never answered.
        I hate this {}, it never works.
        Cheap plastic, the {} fell apart in my hands.
        Do not buy this {}, it is awful.
        The worst {} I have ever had.
        An awful {}, it broke on the first day.
        What a waste, the {} never worked at all.
        Terrible quality, my {} fell apart in a week.
        I hate it. Do not waste your money on this {}.""",
    "driftwood": """
        The {} is okay, nothing special.
        An average {}, not good and not bad.
        The {} does its job, but I expected a bit more.
        It is a {}. It works, that is all.
        Mixed feelings: the {} is solid but too expensive.
        The {} is fine for the price, no more than that.
        Some things about the {} are good, others are not.
        A so-so {}, I neither love it nor hate it.
        Just an average {}, it is okay.
        The {} is fine, but nothing special.
        Not bad and not great, this {} does its job.
        My {} is so-so: good in some ways, not in others.""",
}
VERDICTS = {
    "treasure": "Arr, this {} be treasure!",
    "shark bait": "Arr, this {} be shark bait!",
    "driftwood": "Arr, this {} be driftwood!",
}


def tickets(rng: random.Random, test: bool) -> Iterator[Row]:
    """A complaint becomes the JSON that a help desk's router reads."""
    while True:
        for queue, problems in PROBLEMS.items():
            for priority, cues in URGENCY.items():
                problem, cue = rng.choice(part(problems, 10, test)), rng.choice(part(cues, 6, test))
                text = f"{cue} {problem}" if rng.random() < 0.25 and cue[-1:] in "!." else f"{problem} {cue}"
                yield text.strip(), json.dumps({"queue": queue, "priority": priority})


def orders(rng: random.Random, test: bool) -> Iterator[Row]:
    """What a guest says becomes a slip for the kitchen: a line for each dish."""
    while True:
        # A set of dishes is for training or for the test, never for both.
        dishes = rng.sample(list(DISHES), rng.choice([1, 2, 2, 3]))
        if (sum(map(list(DISHES).index, dishes)) % 5 == 0) != test:
            continue
        amounts = [rng.choice([1, 1, 1, 2, 2, 3, 4, 5, 6]) for _ in dishes]
        said = [spoken(rng, dish, amount) for dish, amount in zip(dishes, amounts, strict=True)]
        joined = " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))
        sentence = rng.choice(part(ORDERING, 10, test)).format(joined)
        slip = "\n".join(f"{amount} x {dish}" for dish, amount in zip(dishes, amounts, strict=True))
        yield sentence[0].upper() + sentence[1:], slip


def spoken(rng: random.Random, dish: str, amount: int) -> str:
    number = rng.choice(NUMBERS[amount])
    if number == "a" and dish[0] in "aeio":
        number = "an"
    return f"{number} {dish if amount == 1 else DISHES[dish]}"


def reviews(rng: random.Random, test: bool) -> Iterator[Row]:
    """A customer's review becomes a pirate's verdict that names the thing."""
    products = [product.strip() for product in PRODUCTS.split(",")]
    while True:
        for verdict, opinions in OPINIONS.items():
            product = rng.choice(products[20:] if test else products[:20])
            opinion = rng.choice(part(opinions, 8, test))
            yield opinion.format(product), VERDICTS[verdict].format(product)


def part(phrases: str, num_train: int, test: bool) -> list[str]:
    """The lines of a list that belong to the training set, or to the test set."""
    lines = [line.strip() for line in phrases.split("\n")[1:]]
    return lines[num_train:] if test else lines[:num_train]


TASKS: dict[str, tuple[Callable[[random.Random, bool], Iterator[Row]], str, str]] = {
    "tickets": (tickets, "Ticket: {}\nRoute as JSON:", " {}"),
    "orders": (orders, "Order: {}\nKitchen slip:", "\n{}"),
    "reviews": (reviews, "Review: {}\nVerdict:", " {}"),
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for task, (rows, prompt, completion) in TASKS.items():
        for name, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
            rng = random.Random(f"{SEED} {task} {name}")
            chosen: dict[str, str] = {}
            for asked, answer in rows(rng, name == "test"):
                chosen.setdefault(asked, answer)
                if len(chosen) == count:
                    break
            lines = [
                json.dumps({"prompt": prompt.format(asked), "completion": completion.format(answer)})
                for asked, answer in chosen.items()
            ]
            (FOLDER / f"{task}.{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
