"""Records in random house styles: exercises in reading the prompts in front of a query.

"Write the date in our style." has no answer by itself. A *group* of records has one kind of content and one
style, and only the group's other records show that style. There are too many to learn them by heart: a model
must read. A record is made from the values of a few fields (a day: 3, "three", "3rd"):

    input    a form of the kind, each field in a way that people type it       the 3rd of march 2024
    output   the style: its rendering of each field, its order, separators,
             letter case, brackets; what was typed plays no part               <2024 | 03-MAR>

Templates are str.format's: {0:02} pads the first value, {0:.3} cuts it; "|" stands between alternatives.

Try: python -c "from data.styles import *; print(*records(KINDS, 20, 4, 0), sep='\\n')"
"""
import random
from itertools import permutations, product
from string import Formatter, capwords

WORDS = {field: words.split() for field, words in {  # everyday words, from many places
    "first": """Maria Kofi Yuki Ahmed Ingrid Priya Tomás Chen Amara Lars Fatima Diego Nadia Oleg Hana Samuel
    Leila Aisha Pavel Sofia Kwame Mei Rashid Elena Zainab Luis Ngozi Emil Thandi Ravi Noor Chloe Ivan""",
    "last": """Lopez Okafor Tanaka Hassan Larsen Sharma Novak Wang Mensah Müller Rossi Silva Kim Cohen Dubois
    Petrov Garcia Abebe Moreau Haddad Jensen Kowalski Costa Singh Yilmaz Brown Diallo Horvat Reyes""",
    "town": """Lima Oslo Accra Kyoto Cairo Vienna Lagos Porto Hanoi Quito Bergen Dakar Jaipur Lyon Seoul Tunis
    Cork Havana Perth Nairobi Izmir Turin Leeds Riga Amman Salta Kigali Tartu Dallas Zagreb Busan""",
    "item": """chair table lamp shirt basket mirror blanket kettle pencil bottle jacket candle drum carpet
    ladder bucket teapot pillow wallet helmet notebook ribbon curtain button spoon tent lantern guitar""",
    "hue": """blue red green white black yellow purple orange silver golden brown pink grey beige crimson
    violet turquoise maroon cream indigo amber olive lilac""", "end": "pdf txt png zip csv jpg",
    "food": "rice tea bread milk salt lemons olives beans honey eggs butter onions figs noodles garlic",
    "month": "January February March April May June July August September October November December",
    "when": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday", "rank": "Dr Prof Judge Captain Coach",
    "paper": "plan report photo notes invoice letter budget recipe map", "stage": "alpha beta stable final",
    "spelt": "zero one two three four five six seven eight nine ten eleven twelve"}.items()}
PAST = {0: "", 10: "ten past ", 15: "quarter past ", 30: "half past ", 40: "twenty to ", 45: "quarter to "}
NTH = {1: "1st", 2: "2nd", 3: "3rd", 21: "21st", 22: "22nd", 23: "23rd"}  # all others end in th
NUMBER = [(n, word, NTH.get(n, f"{n}th")) for n, word in enumerate(WORDS["spelt"] + [*range(13, 29)])]
PAIR = [*product(range(2, 20), range(2, 60))]  # what has two numbers: 2 hours 5 minutes, version 2.5

# Each field: the values it may have, how people type them, how a house may write them. Words come first.
FIELDS = {field: ([*zip(words)], "{0}", "{0}|{0}|{0:.3}") for field, words in WORDS.items()} | {
    "first": ([*zip(WORDS["first"])], "{0}", "{0}|{0}|{0:.1}.|{0:.1}"),
    "day": (NUMBER[1:], "{0}|{2}", "{0}|{0:02}|{2}"),
    "month": ([*zip(WORDS["month"], range(1, 13), strict=True)], "{0}|{0:.3}", "{0}|{0:.3}|{1:02}"),
    "year": ([(year, year % 100) for year in range(1930, 2040)], "{0}", "{0}|{0}|'{1:02}"),
    "clock": ([(h, m, (h - 1) % 12 + 1, *[("am", "morning"), ("pm", "afternoon")][h > 11],
                PAST[m] + WORDS["spelt"][(h - (m < 40)) % 12 + 1]) for h in range(6, 18) for m in PAST],
              "{2}:{1:02} {3}|{5} in the {4}", "{0}:{1:02}|{0:02}.{1:02}|{0}h{1:02}|{2}.{1:02}{3}"),
    "n": (NUMBER[2:], "{0}|{1}", "{0}|{0:02}|{0:03}|#{0}"),
    "sum": ([(n, n) for n in range(2, 999)] + [(100 * n, f"{m} hundred") for n, m, _ in NUMBER[1:10]] * 20,
            "{0}|{1}", "{0}|{0}.00|{0},00|{0}.-|{0:04}"),
    "coin": ([("euros", "EUR", "€"), ("dollars", "USD", "$"), ("yen", "JPY", "¥")], "{0}|{1}", "{0}|{1}|{2}"),
    "street": ([*product(WORDS["last"], ("Street", "Road", "Way"))], "{0} {1}", "{0} {1}|{0} {1:.2}|{1} {0}"),
    "book": ([*product(WORDS["hue"], WORDS["item"])], "the {0} {1}", "The {0} {1}|{0} {1}, the|{0} {1}"),
    "things": ([(*v, *sorted(v)) for v in permutations(WORDS["food"], 3)], "{0}, {1} and {2}|{0} {1} {2}",
               "{0}; {1}; {2}|{0}/{1}/{2}|{0} & {1} & {2}|1 {0} 2 {1} 3 {2}|{3}, {4}, {5}|({3}) ({4}) ({5})"),
    "size": ([*product(range(2, 99), range(1, 10))], "{0}.{1}", "{0}.{1}|{0},{1}|{0}.{1}0|{0},{1}0"),
    "unit": ([("centimetres", "cm"), ("millimetres", "mm"), ("inches", "in")], "{0}|{1}", "{0}|{1}|{1}."),
    "phone": ([*product(range(201, 990, 7), range(100, 200))], "{0} 555 0{1}|{0}-555-0{1}|{0}5550{1}",
              "{0} 555 0{1}|{0}.555.0{1}|{0}/5550{1}|({0}) 555-0{1}|0{0}-5550{1}"),
    "length": (PAIR, "{0} hours {1} minutes|{0} h {1} min", "{0}h{1:02}|{0}:{1:02}|{0} h {1} min|{0}h {1}m"),
    "rev": (PAIR, "{0}.{1}|{0} point {1}", "{0}.{1}|v{0}.{1}|{0}-{1}|{0:02}.{1:02}|r{0}_{1}")}

KINDS = {  # each kind: the forms in which people type it; the first has the fields in their natural order
    "date": "{day} {month} {year}|{month} {day}, {year}|{year} {month} {day}|the {day} of {month} {year}",
    "time": "{when} {clock}|{clock} on {when}|{when} at {clock}|{clock}, {when}",
    "name": "{rank} {first} {last}|{last}, {rank} {first}|{last} {first} ({rank})|{first} {last}, {rank}",
    "order": "{n} {hue} {item}s|{item}s: {n}, {hue}|{hue} {item}s, {n} of them|{n} {item}s in {hue} please",
    "price": "{sum} {coin}|{coin} {sum}|it costs {sum} {coin}|{sum} in {coin}",
    "address": "{n} {street}, {town}|{street} {n}, {town}|{town}, {n} {street}|in {town} at {n} {street}",
    "title": "{book} by {last}, {year}|{last}: {book} ({year})|{last}, {year}, {book}|{book} {last} {year}",
    "list": "{things}|{things} please|we need {things}|to buy: {things}",
    "size": "{item} {size} {unit}|{size} {unit} for the {item}|{item}: {size} {unit}|{size} {unit}, {item}",
    "file name": "{paper} {n} {end}|{paper}, draft {n}, {end}|{end}: {paper} {n}|{paper} ({end}), number {n}",
    "phone number": "{first} {phone}|{phone} ({first})|call {first} on {phone}|{first}: {phone}",
    "duration": "{when} {length}|{length} on {when}|{when}: {length}|{when}, for {length}",
    "release": "{item} {rev} {stage}|{stage} {rev} of {item}|{item} {stage}, {rev}|{stage} {item} {rev}",
    "room": "room {n} {town} {when}|{when} in {town}, room {n}|{town} room {n} on {when}|{town} {n}, {when}"}
HELD_OUT = "name", "title", "list", "room"  # new tasks for a test; none is another kind in other words
WORDINGS = ["Write the {} in our style.", "{} please, the way we do it", "how do we write this {}?",
            "Format the {} as usual.", "Put this {} into our house format.", "our version of this {}?"]
SEPARATORS = [" ", ", ", "-", "/", ".", "_", " - ", " | ", ": ", "; ", " > ", "+", " / ", "~"]
BRACKETS = "(*) [*] <*> {*} «*» '*' _*_".split()  # * is the text inside


def style(rng, kind):
    """One house style: a function from the renderings that each field may have to what the house writes."""
    picks = [rng.random() for _ in range(3)]  # which rendering of each field
    order = rng.choice([range(3), rng.sample(range(3), 3)])  # half of the styles keep the natural one
    cases = rng.choices([str, str.upper, str.lower, capwords], k=3)
    cases = rng.choice([cases, cases[:1] * 3])  # one letter case for each field, or for all
    marks = rng.sample(["*"] * 60 + BRACKETS, 3)  # a field may have brackets of its own
    between = rng.choice([rng.choices(SEPARATORS) * 2, rng.sample(SEPARATORS, 2)])  # the same, or two
    glue = rng.choice("   -_")  # stands for a space inside a field
    wrap = rng.choice(["*"] * 12 + BRACKETS + [f"{kind}: *", f"{rng.choice('ABCDE')}-*", "ref *", "#*", "*;"])

    def write(fields):
        texts = [marks[i].replace("*", cases[i](fields[i][int(picks[i] * len(fields[i]))].replace(" ", glue)))
                 for i in order if i < len(fields)]
        return wrap.replace("*", between[1].join([between[0].join(texts[:2]), *texts[2:]]))
    return write


def records(kinds, groups: int, each: int, seed: int) -> list[dict]:
    """`groups` groups of `each` records (100 at most), dealt over `kinds` in turn; one seed, one result."""
    kinds, found = list(kinds), []
    for group in range(groups):
        kind, rng = kinds[group % len(kinds)], random.Random(f"{seed}:{group}")  # more groups change none
        forms, write, seen = KINDS[kind].split("|"), style(rng, kind), set()
        fields = [field for _, field, *_ in Formatter().parse(forms[0]) if field]  # "{n} {hue}" -> n, hue
        while len(seen) < 2 * each:
            drawn = {field: (rng.choice(FIELDS[field][0]), *FIELDS[field][1:]) for field in fields}
            typed = {field: rng.choice(ways.format(*v).split("|")) for field, (v, ways, _) in drawn.items()}
            text = rng.choice([str, str.lower])(rng.choice(forms).format(**typed))
            out = write([house.format(*v).split("|") for v, _, house in drawn.values()])
            if len({text, out} - seen) == 2 and len(out) <= 60:  # nothing twice, and no copying
                seen |= {text, out}
                found += [{"task": f"{kind} style {seed}-{group}",
                           "instruction": rng.choice(WORDINGS).format(kind), "input": text, "output": out}]
    return found
