"""The words of the generated catalogue: kinds of products with their attributes, options, brands and prices.

No attribute or option value of a kind resembles another of it, and no two kinds share a word of their names or a
brand, so that the reward of a generated goal never rests on a chance likeness.
"""

from __future__ import annotations

from dataclasses import dataclass

COLORS = ("black", "white", "navy", "olive", "crimson", "teal", "beige", "silver")
SIZES = ("small", "medium", "large", "x-large", "xx-large")


@dataclass(frozen=True)
class Kind:
    """One kind of product."""

    name: str
    """As an instruction calls it."""
    category: tuple[str, str]
    brands: tuple[str, ...]
    attributes: tuple[str, ...]
    options: tuple[tuple[str, tuple[str, ...]], tuple[str, tuple[str, ...]]]
    prices: tuple[int, int]
    """Lowest and highest, in dollars."""
    use: str
    """What its description says it is for."""


KINDS = (
    Kind(
        "running shoes",
        ("clothing, shoes & jewelry", "athletic footwear"),
        ("Strideon", "Fellbound"),
        ("arch support", "rubber sole", "water resistant", "memory foam", "wide fit", "quick drying", "vegan leather",
         "ankle padding", "reflective trim", "non slip"),
        (("color", COLORS), ("size", ("6", "7", "8", "9", "10", "11", "12"))),
        (25, 140),
        "long miles on road and trail",
    ),
    Kind(
        "t-shirt",
        ("clothing, shoes & jewelry", "tops"),
        ("Cottonmere", "Plainfold"),
        ("machine wash", "organic cotton", "long sleeve", "moisture wicking", "slim fit", "crew neck", "tagless label",
         "sun protection", "stretch fabric", "pre shrunk"),
        (("color", COLORS), ("size", SIZES)),
        (8, 45),
        "every day of the week",
    ),
    Kind(
        "backpack",
        ("luggage & travel gear", "bags for school"),
        ("Tramperly", "Holdfast"),
        ("water resistant", "laptop sleeve", "anti theft", "padded straps", "usb charging", "carry on", "lockable zips",
         "side pockets", "light weight", "recycled nylon"),
        (("color", COLORS), ("size", ("15 liter", "20 liter", "28 liter", "35 liter"))),
        (20, 120),
        "commutes and short trips",
    ),
    Kind(
        "desk lamp",
        ("home & kitchen", "lighting"),
        ("Lumenry", "Brightwell"),
        ("touch control", "eye caring", "wireless charger", "energy efficient", "swing arm", "clamp base",
         "auto dimming", "night mode", "battery powered", "memory function"),
        (("color", COLORS), ("style", ("classic", "modern", "industrial", "farmhouse"))),
        (15, 90),
        "reading and late work",
    ),
    Kind(
        "office chair",
        ("home & kitchen", "furniture"),
        ("Sedero", "Perchwood"),
        ("lumbar support", "breathable mesh", "height adjustable", "high back", "heavy duty", "flip up arms",
         "tilt lock", "easy assemble", "headrest included", "faux leather"),
        (("color", COLORS), ("style", ("task", "executive", "gaming", "drafting"))),
        (60, 320),
        "a full day of sitting",
    ),
    Kind(
        "curtains",
        ("home & kitchen", "window treatments"),
        ("Drapewell", "Veilhouse"),
        ("machine wash", "room darkening", "thermal insulated", "noise reducing", "rod pocket", "light filtering",
         "wrinkle free", "grommet top", "fade resistant", "eco friendly"),
        (("color", COLORS), ("size", ("52 x 63", "52 x 84", "52 x 96", "70 x 108"))),
        (14, 80),
        "bedrooms and living rooms",
    ),
    Kind(
        "water bottle",
        ("sports & outdoors", "hydration"),
        ("Aquaterra", "Sipwell"),
        ("leak proof", "double wall", "bpa free", "stainless steel", "dishwasher safe", "straw lid", "wide mouth",
         "vacuum insulated", "carrying loop", "sweat free"),
        (("color", COLORS), ("size", ("12 ounce", "18 ounce", "24 ounce", "32 ounce"))),
        (9, 48),
        "the gym and the trail",
    ),
    Kind(
        "headphones",
        ("electronics", "portable audio"),
        ("Sonavale", "Quietude"),
        ("noise cancelling", "over ear", "fast charging", "deep bass", "fold flat", "built in mic", "long lasting",
         "high fidelity", "low latency", "memory foam"),
        (("color", COLORS), ("connection", ("bluetooth", "wired", "usb dongle"))),
        (18, 260),
        "music and calls",
    ),
    Kind(
        "phone case",
        ("cell phones & accessories", "protection"),
        ("Shellguard", "Corneria"),
        ("wireless charging", "drop proof", "card holder", "kick stand", "anti yellowing", "screen protector",
         "raised edges", "liquid silicone", "magnetic ring", "slim fit"),
        (("color", COLORS), ("model", ("alpha", "borealis", "cygnus", "delphin"))),
        (7, 40),
        "daily carry",
    ),
    Kind(
        "shampoo",
        ("beauty & personal care", "hair wash"),
        ("Botanelle", "Riverfoam"),
        ("sulfate free", "tea tree", "cruelty free", "color safe", "anti dandruff", "argan oil", "sensitive scalp",
         "volume boosting", "paraben free", "dry repair"),
        (("scent", ("lavender", "citrus", "coconut", "mint", "unscented")),
         ("size", ("8 ounce", "12 ounce", "16 ounce", "33 ounce"))),
        (6, 38),
        "all seasons",
    ),
    Kind(
        "coffee beans",
        ("grocery & gourmet food", "roasted beverages"),
        ("Monteverro", "Kilnyard"),
        ("fair trade", "low acid", "single origin", "shade grown", "small batch", "usda organic", "high altitude",
         "sugar free", "gluten free", "kosher certified"),
        (("roast", ("blonde", "medium", "dark", "espresso")), ("size", ("12 ounce", "2 pound", "5 pound"))),
        (9, 65),
        "drip, press and moka pot",
    ),
    Kind(
        "throw pillow",
        ("home & kitchen", "bedding decor"),
        ("Nestlery", "Softrow"),
        ("hidden zipper", "machine wash", "super soft", "hand woven", "velvet cover", "insert included",
         "fade resistant", "hypoallergenic filling", "double sided", "tufted pattern"),
        (("color", COLORS), ("size", ("12 x 20", "16 x 16", "18 x 18", "24 x 24"))),
        (8, 55),
        "sofas and reading corners",
    ),
)  # fmt: skip

FEATURE_ENDINGS = (
    "made to last",
    "checked by hand",
    "chosen with care",
    "liked by our customers",
    "a detail that counts",
)
DESCRIPTIONS = (
    "{brand} makes this {name} for {use}. It comes with {listed}.",
    "A {name} for {use}, by {brand}. You get {listed}.",
    "For {use}: a {name} by {brand} with {listed}.",
)
REVIEWS = (
    "Arrived quickly and looks like the picture.",
    "Good value, I would order it again.",
    "Not quite what I expected, but it does its job.",
    "My third one, never a complaint.",
    "The parcel was late, the article is fine.",
)
