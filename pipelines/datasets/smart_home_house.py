"""The house that the smart-home rows speak about: areas, floors, devices and things people say.

Names are plain words, and none of them contains an area: "kitchen light" would be both a device and
"the light in the kitchen", and an utterance may have one meaning only. Home Assistant's vocabulary is kept:
a device belongs to one domain, and the domain decides which sentences may name it.
"""

from __future__ import annotations

INTENTS = frozenset(
    {
        "HassClimateGetTemperature",
        "HassClimateSetTemperature",
        "HassFanSetSpeed",
        "HassGetCurrentDate",
        "HassGetCurrentTime",
        "HassGetWeather",
        "HassLightSet",
        "HassMediaNext",
        "HassMediaPause",
        "HassMediaUnpause",
        "HassSetPosition",
        "HassSetVolume",
        "HassShoppingListAddItem",
        "HassTurnOff",
        "HassTurnOn",
        "HassVacuumReturnToBase",
        "HassVacuumStart",
    }
)
"""What this house can do. The grammar knows 42 intents, half of its templates for arithmetic on timers and questions about states;
a 135M model learnt all 42 to an exact match of only 0.53 from 1,000 rows, which is what a laptop trains in minutes."""

AREAS = (
    "kitchen",
    "living room",
    "bedroom",
    "bathroom",
    "garage",
    "hallway",
    "office",
    "nursery",
    "dining room",
    "laundry room",
    "guest room",
    "playroom",
    "patio",
    "conservatory",
    "library",
    "gym",
    "workshop",
    "pantry",
)

FLOORS = ("ground", "first", "second", "basement", "upstairs", "downstairs", "mezzanine")

DEVICES: dict[str, tuple[str, ...]] = {
    "light": ("reading lamp", "fairy lights", "chandelier", "night light", "spotlights", "bedside", "mirror", "desk", "pendant", "lantern"),
    "switch": ("coffee maker", "kettle", "dishwasher", "space heater", "toaster", "printer", "christmas tree", "fountain pump"),
    "fan": ("tower fan", "exhaust fan", "air purifier", "ventilator", "extractor"),
    "media_player": ("television", "soundbar", "record player", "smart speaker", "projector", "radio"),
    "climate": ("thermostat", "air conditioner", "heat pump", "radiator", "wall heater"),
    "cover": ("skylight", "projection screen", "pergola roof", "roller blind", "canopy", "bay shade"),
    "lock": ("front door", "back door", "shed door", "wine cabinet", "safe", "side gate"),
    "valve": ("water main", "sprinkler valve", "gas valve", "pool valve"),
    "sensor": ("outside humidity", "energy meter", "rain gauge", "freezer", "air quality", "water tank level"),
    "binary_sensor": ("mailbox", "cat flap", "driveway motion", "porch motion", "cellar hatch", "crib"),
    "person": ("alice", "bob", "carlos", "priya", "grandma", "daniel"),
    "scene": ("movie night", "romantic dinner", "bright morning", "party mode", "focus time", "bedtime"),
    "script": ("good night routine", "leaving home", "morning briefing", "lock up", "water the plants"),
    "button": ("doorbell", "router restart", "cat feeder", "panic alarm"),
    "input_boolean": ("guest mode", "holiday mode", "quiet hours", "vacation"),
    "lawn_mower": ("mowbot", "shaun", "grass cutter"),
    "vacuum": ("rosie", "dusty", "robo sweep", "hoover"),
    "todo": ("groceries", "chores", "packing", "homework", "birthday gifts"),
    "weather": ("london", "oslo", "denver", "lisbon", "kyoto"),
}

ALIASES: dict[str, tuple[str, ...]] = {
    "television": ("tv", "telly"),
    "air conditioner": ("aircon",),
    "coffee maker": ("coffee machine",),
}
"""Other spoken forms of a device; the tool call carries the canonical name."""

FREE_TEXT: dict[str, tuple[str, ...]] = {
    "message": (
        "dinner is ready",
        "the taxi is here",
        "time for bed",
        "we leave now",
        "lunch is served",
        "grandpa has arrived",
        "the movie starts soon",
        "wash your hands",
    ),
    "search_query": (
        "jazz",
        "bohemian rhapsody",
        "taylor swift",
        "abbey road",
        "classical piano",
        "the lion king",
        "stranger things",
        "daft punk",
        "rain sounds",
        "miles davis",
    ),
    "zone": ("home", "work", "school", "university", "airport", "town"),
    "timer_name": ("pizza", "laundry", "pasta", "tea", "homework", "workout", "bread", "nap"),
    "timer_command": (
        "turn off the oven",
        "open the blinds",
        "call the dentist",
        "start the bath",
        "water the roses",
        "check the soup",
        "charge the car",
        "feed the dog",
    ),
    "shopping_list_item": (
        "milk",
        "brown bread",
        "olive oil",
        "apples",
        "dish soap",
        "coffee beans",
        "cheddar",
        "batteries",
        "rice",
        "paper towels",
    ),
    "todo_list_item": ("call mum", "sunscreen", "oat milk", "vacuum the car", "passport", "math exercises", "flowers", "clean the gutters"),
}
"""What people say where the grammar takes any words, by the name of its wildcard list."""

NARROWED_RANGES: dict[str, tuple[int, int]] = {
    "temperature": (14, 29),
    "color_temperature": (2000, 6500),
    "timer_hours": (1, 12),
    "timer_minutes": (1, 60),
    "timer_seconds": (5, 90),
}
"""Plausible limits, inclusive, where the grammar's own are wider than a person's: degrees Celsius, kelvin, timer units."""
