"""Words shared by the story-like families. Small on purpose: every word is seen thousands of times by a tiny model."""

from __future__ import annotations

WOMEN = ["Anna", "Bella", "Clara", "Dora", "Emma", "Flora", "Greta", "Helen", "Irma", "Julia", "Karin", "Lena"]
MEN = ["Adam", "Ben", "Carl", "David", "Emil", "Frank", "Georg", "Henry", "Ivan", "Jack", "Kevin", "Leo"]
PEOPLE = [(name, "she") for name in WOMEN] + [(name, "he") for name in MEN]

# countable things for sums; the plural is regular
THINGS = [
    "apple",
    "book",
    "coin",
    "card",
    "shell",
    "stone",
    "pen",
    "cake",
    "egg",
    "stamp",
    "ball",
    "flower",
    "ticket",
    "button",
    "cup",
    "ring",
]

# a container holds things: "3 boxes with 4 pens each"
CONTAINERS = [
    ("box", "boxes"),
    ("bag", "bags"),
    ("jar", "jars"),
    ("basket", "baskets"),
    ("shelf", "shelves"),
    ("case", "cases"),
]
