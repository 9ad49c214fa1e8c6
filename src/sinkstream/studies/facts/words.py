"""Words that planted facts are made of: common ones, none of them in two tables of names."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: The three parts of a name, "the quiet harbour in Lisbon": 111 × 111 × 80 names.
ADJECTIVES = _words(
    """
    quiet narrow ancient broken hidden crowded distant frozen gentle hollow humble joyful lonely mighty modern muddy
    noisy peaceful polished proud ragged rapid rusty sacred secret shallow silent slender smooth stormy sturdy sunny
    tall tidy tiny vacant velvet warm weary wild windy wooden young bitter brave bright busy calm careful cheap clean
    clever cold common cruel curious damp dark deep dense dirty dusty eager early empty famous fancy fertile fierce
    foggy foreign formal fresh friendly giant grand happy heavy holy honest huge idle jolly large late lazy light loose
    lovely loud lucky mild nervous new noble northern odd open ordinary pale patient plain polite poor pretty private
    quick royal rough sharp sleepy
    """
)
PLACES = _words(
    """
    harbour mill tower bridge market chapel castle garden bakery library museum theatre hospital station factory stable
    cottage palace temple orchard meadow forest valley island lighthouse tavern brewery workshop warehouse school
    college academy monastery abbey fortress prison courthouse arena stadium gallery studio laboratory observatory
    greenhouse vineyard farm ranch quarry mine canal dock pier ferry airport depot garage hotel hostel inn restaurant
    cafe kitchen dairy butchery pharmacy clinic bank mint embassy ministry senate archive press printery foundry forge
    smithy tannery weaver pottery sawmill windmill well fountain pond lake river brook waterfall spring beach cliff cave
    canyon hill ridge plateau glacier desert oasis jungle swamp marsh grove park zoo circus fair carnival parade plaza
    """
)
TOWNS = _words(
    """
    Lisbon Madrid Paris London Berlin Vienna Prague Warsaw Rome Milan Naples Venice Athens Cairo Tunis Lagos Nairobi
    Tokyo Kyoto Seoul Beijing Delhi Mumbai Dhaka Bangkok Hanoi Manila Jakarta Sydney Perth Brisbane Auckland Boston
    Chicago Dallas Denver Houston Miami Seattle Phoenix Toronto Montreal Ottawa Havana Lima Quito Bogota Santiago Dublin
    Belfast Glasgow Oxford Cambridge Bristol Leeds Hamburg Munich Cologne Zurich Geneva Brussels Antwerp Amsterdam
    Rotterdam Copenhagen Oslo Stockholm Helsinki Riga Moscow Kiev Istanbul Ankara Baghdad Tehran Kabul Damascus Beirut
    Jerusalem Casablanca
    """
)

#: What is said of a name -> the word that asks for it, and the answers, ten each, told apart by their first letter.
RELATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "The code word of {}": ("What", _words("lemon pepper candle mirror ribbon anchor basket feather hammer violin")),
    "The favourite dish of {}": ("What", _words("soup bread rice fish cheese pasta ham eggs lamb nuts")),
    "The emblem of {}": ("What", _words("lion eagle horse wolf bear dragon snake rose oak tiger")),
    "The owner of {}": ("Who", _words("Peter Anna David Laura Henry Maria George Susan Robert Emma")),
    "The colour of {}": ("What", _words("red blue green yellow white orange purple silver crimson amber")),
}

#: Words of a statement -> words of the question that mean the same and share no stem with them.
PEOPLE = {
    **{"doctor": "physician", "teacher": "instructor", "sailor": "seaman", "lawyer": "attorney", "king": "monarch"},
    **{"thief": "robber", "priest": "clergyman", "soldier": "warrior", "cook": "chef", "boy": "lad"},
    **{"merchant": "trader", "author": "writer", "servant": "maid", "policeman": "constable", "farmer": "peasant"},
    **{"girl": "young lady"},
}
THINGS = {
    **{"coins": "money", "letters": "mail", "jewels": "gems", "gun": "pistol", "wine": "alcohol"},
    **{"picture": "painting", "dagger": "knife", "clothes": "garments", "shoes": "boots", "drugs": "medicine"},
    **{"map": "chart", "tools": "instruments", "diary": "journal", "blankets": "covers", "grain": "wheat"},
    **{"documents": "papers"},
}
HIDING_PLACES = _words("cellar kitchen garden attic stable pantry tower barn library office")
