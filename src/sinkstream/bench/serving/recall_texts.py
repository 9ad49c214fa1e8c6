"""What is said in the chats of ``bench --serve recall``: facts about a person, and questions that no fact answers.

Written for this measurement after the thresholds of `sinkstream.serve.recall` were chosen, which were chosen on other
texts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """Something that a person tells, and two questions for it.

    Attributes
    ----------
    statement : str
        As it is told.
    named : str
        A question with words of the statement.
    paraphrased : str
        A question in other words.
    answers : tuple of str
        Lower case; a reply that has one of them is right.
    """

    statement: str
    named: str
    paraphrased: str
    answers: tuple[str, ...]


#: Ways to tell a fact.
FRAMES = ("{}", "Just so you know: {}", "{} What do you say to that?", "I wanted to tell you something. {}")

FACTS = tuple(
    Fact(statement, named, paraphrased, tuple(answers.split("|")))
    for statement, named, paraphrased, answers in (
        (
            "By the way, our puppy answers to Biscuit.",
            "What does our puppy answer to?",
            "What did we name the little dog?",
            "biscuit",
        ),
        (
            "I grew up in a village near Trondheim, in a yellow house by the fjord.",
            "Near which city was the village that I grew up in?",
            "Where did I spend my childhood?",
            "trondheim",
        ),
        (
            "Grandpa Osbert repairs clocks in his cellar.",
            "What does Grandpa Osbert repair?",
            "Which hobby does my mother's father have?",
            "clock",
        ),
        (
            "The spare key of the cottage hangs behind the oil painting.",
            "Where does the spare key of the cottage hang?",
            "How do I get in if I lock myself out of the holiday house?",
            "painting",
        ),
        (
            "My train to Ghent leaves at 7:52 tomorrow.",
            "At what time does my train to Ghent leave?",
            "When do I have to be on the platform?",
            "7:52",
        ),
        (
            "Our wedding was in the autumn of 2009, in a barn full of pumpkins.",
            "In which year was our wedding?",
            "Since when am I married?",
            "2009",
        ),
        (
            "I owe Priscilla forty euros for the concert.",
            "How much do I owe Priscilla?",
            "Whom do I still have to pay back, and what sum?",
            "forty|40",
        ),
        (
            "The plumber, Mr. Okonkwo, comes on Friday about the leaking boiler.",
            "What does Mr. Okonkwo come about?",
            "Why did I ask for a craftsman?",
            "boiler",
        ),
        (
            "My daughter Tamsin has started to learn fencing.",
            "What has Tamsin started to learn?",
            "Which sport does my child do now?",
            "fencing",
        ),
        (
            "We named the sailing boat Kittiwake.",
            "What is the name of our sailing boat?",
            "What is painted on the hull of our yacht?",
            "kittiwake",
        ),
        (
            "The dentist told me to come back in eleven weeks.",
            "When did the dentist tell me to come back?",
            "How long until my teeth are checked again?",
            "eleven|11",
        ),
        (
            "For the potluck I promised to bring a rhubarb tart.",
            "What did I promise to bring to the potluck?",
            "Which dish am I responsible for at the party?",
            "rhubarb",
        ),
        (
            "The password hint on my old laptop is the word marmalade.",
            "What is the password hint on my old laptop?",
            "Which word helps me to log in to the computer?",
            "marmalade",
        ),
        (
            "My brother-in-law Eustace drives a snow plough in winter.",
            "What does Eustace drive?",
            "What job does my wife's brother do in the cold season?",
            "plough|plow",
        ),
        (
            "I keep the passports in an old violin case.",
            "Where do I keep the passports?",
            "In what place are our travel documents?",
            "violin",
        ),
        (
            "In our reading group it was my turn to choose, and I chose Middlemarch.",
            "Which book did I choose for the reading group?",
            "What novel are we going to discuss?",
            "middlemarch",
        ),
        (
            "My landlady, Mrs. Vandermeer, wants the rent on the third of each month.",
            "On which day does Mrs. Vandermeer want the rent?",
            "When is the money for my apartment due?",
            "third|3rd",
        ),
        (
            "The tortoise of our class weighs almost two kilos and is called Hannibal.",
            "What is the tortoise of our class called?",
            "What is the name of the slow animal at school?",
            "hannibal",
        ),
        (
            "I lost my umbrella in Antwerp.",
            "Where did I lose my umbrella?",
            "In what town did I leave the thing that keeps the rain off?",
            "antwerp",
        ),
        (
            "After the operation I must not lift anything above nine kilos.",
            "How much may I lift after the operation?",
            "What weight is too heavy for me now?",
            "nine|9",
        ),
        (
            "Our choir sings Haydn at Whitsun.",
            "Whose music does our choir sing at Whitsun?",
            "Which composer do we rehearse?",
            "haydn",
        ),
        (
            "Cousin Philippa breeds alpacas in Wales.",
            "What does cousin Philippa breed?",
            "Which animals does my relative keep on her farm?",
            "alpaca",
        ),
        (
            "The locker at the swimming pool is number 318.",
            "Which number has the locker at the swimming pool?",
            "Where did I leave my clothes while I was in the water?",
            "318",
        ),
        (
            "I have decided to paint the hallway terracotta.",
            "How have I decided to paint the hallway?",
            "What shade will the corridor get?",
            "terracotta",
        ),
        (
            "My tax adviser moved his office to Gloucester Street.",
            "To which street did my tax adviser move his office?",
            "Where do I find the man who does my accounts?",
            "gloucester",
        ),
        (
            "One tyre of the caravan is flat.",
            "Which part of the caravan is flat?",
            "What has to be fixed before we go camping?",
            "tyre|tire",
        ),
        (
            "My stepmother collects thimbles from every country she visits.",
            "What does my stepmother collect?",
            "What would be a good present for my father's second wife?",
            "thimble",
        ),
        (
            "Nobody knows it yet, but the baby will be called Leopold.",
            "What will the baby be called?",
            "Which name did we choose for our son?",
            "leopold",
        ),
        (
            "I ran the marathon of Rotterdam in four hours and six minutes.",
            "How long did I need for the marathon of Rotterdam?",
            "What is my time in long distance running?",
            "four hours|4 hours|4:06",
        ),
        (
            "The recipe of my aunt needs a pinch of cardamom.",
            "Which spice does the recipe of my aunt need?",
            "What do I have to add to the family cake?",
            "cardamom",
        ),
        (
            "Our band plays its first gig at the Red Heron.",
            "Where does our band play its first gig?",
            "In which pub is our concert?",
            "heron",
        ),
        (
            "My physiotherapist, Anneliese, said that I should swim twice a week.",
            "What did Anneliese say that I should do?",
            "What sport is good for my back?",
            "swim",
        ),
        (
            "The allotment next to ours belongs to a retired sailor.",
            "Who owns the allotment next to ours?",
            "What was the profession of the man who gardens beside us?",
            "sailor",
        ),
        (
            "I have a lecture on volcanoes to give in March.",
            "What is the subject of the lecture that I have to give?",
            "What do I have to talk about in spring?",
            "volcano",
        ),
        (
            "My old school friend Rupert went to live in Montevideo.",
            "Where did Rupert go to live?",
            "In which town does my class mate have his home?",
            "montevideo",
        ),
        (
            "For my birthday I would love a telescope.",
            "What would I love for my birthday?",
            "Which present do I wish for?",
            "telescope",
        ),
        (
            "The hamster escaped again and we found him in the dishwasher.",
            "Where did we find the hamster?",
            "In what place was the runaway pet?",
            "dishwasher",
        ),
        (
            "My wife is on the night shift at the bakery until June.",
            "Until when is my wife on the night shift?",
            "How long will I sleep alone?",
            "june",
        ),
        (
            "We booked the ferry to Orkney for the nineteenth.",
            "For which day did we book the ferry to Orkney?",
            "When do we travel to the islands?",
            "nineteen|19",
        ),
        (
            "Please remember that the fuse of the kitchen is the fourth from the left.",
            "Which fuse is that of the kitchen?",
            "Which switch do I flip when the stove goes dark?",
            "fourth",
        ),
        (
            "My nephew Casimir wants to become a beekeeper.",
            "What does Casimir want to become?",
            "Which trade does my brother's boy dream of?",
            "beekeep",
        ),
        (
            "The sofa will be delivered on Tuesday between two and four.",
            "On which day will the sofa be delivered?",
            "When must somebody be at home for the furniture?",
            "tuesday",
        ),
        (
            "I cannot stand the smell of lavender.",
            "Which smell can I not stand?",
            "What scent should nobody give me?",
            "lavender",
        ),
        (
            "The chess club elected Ingeborg as its president.",
            "Whom did the chess club elect as its president?",
            "Who leads the people that I play board games with?",
            "ingeborg",
        ),
        (
            "My thesis was about the history of buttons.",
            "What was my thesis about?",
            "What did I write on at university?",
            "button",
        ),
        (
            "Last night I dreamt of a purple elephant in the lift.",
            "Which animal did I dream of last night?",
            "What did I see in my sleep?",
            "elephant",
        ),
        (
            "The mechanic says that the gearbox has to be replaced.",
            "What does the mechanic say has to be replaced?",
            "What is broken in my car?",
            "gearbox",
        ),
        (
            "My grandmother came from Riga and baked bread on Saturdays.",
            "Where did my grandmother come from?",
            "Which town does my family have its roots in?",
            "riga",
        ),
    )
)

#: Kind -> messages that no fact answers.
UNRELATED: dict[str, tuple[str, ...]] = {
    "knowledge": (
        "Which ocean is the deepest?",
        "How do magnets work?",
        "Who painted the Mona Lisa?",
        "What is the currency of Japan?",
        "Why do leaves turn red?",
        "How tall is Mount Everest?",
        "What is an eclipse?",
        "When did the Berlin Wall fall?",
        "What causes thunder?",
        "How does a refrigerator stay cold?",
        "Who discovered penicillin?",
        "What is the longest river in Africa?",
        "What do pandas eat?",
        "How many keys does a piano have?",
        "What is inflation?",
        "Why is sea water salty?",
        "Which planet is closest to the sun?",
        "What is a black hole?",
        "How do vaccines work?",
        "What language is spoken in Brazil?",
        "At what temperature does mercury freeze?",
        "Who was Cleopatra?",
        "How is glass made?",
        "What is an algorithm?",
        "How do birds find their way south?",
        "What is yeast?",
        "Who invented the telephone?",
        "What is the difference between a crocodile and an alligator?",
        "How many bones has the human body?",
        "What is democracy?",
        "How far away is the nearest star?",
        "What is the square root of 144?",
    ),
    "request": (
        "Write a limerick about rain.",
        "Translate 'thank you very much' into Spanish.",
        "Give me three tips for public speaking.",
        "Suggest a name for a bookshop.",
        "Write an apology to a customer whose parcel was late.",
        "Make a shopping list for a picnic.",
        "Summarise the story of Cinderella in two sentences.",
        "Explain recursion to a beginner.",
        "What is 17 times 23?",
        "Write a haiku about frost.",
        "List five adjectives for a storm.",
        "Correct this sentence: he go to market yesterday.",
        "Give me a riddle.",
        "Plan a weekend in Vienna.",
        "Write a function that reverses a string.",
        "Describe a sunset in one line.",
        "Propose a workout of ten minutes.",
        "Convert 5 miles to kilometres.",
        "Write a slogan for a toothpaste.",
        "Tell me a tale of a dragon who is afraid of fire.",
        "Give me a synonym of happy.",
        "Compare tea and coffee.",
        "Draft an invitation to a housewarming.",
        "Count from ten down to one.",
    ),
    "small talk": (
        "How are you today?",
        "Thanks, that was helpful.",
        "Can you say that more simply?",
        "Are you sure?",
        "That made me laugh.",
        "I am bored.",
        "Good morning!",
        "Why?",
        "Tell me more.",
        "What do you think about that?",
        "I did not sleep well.",
        "Let us change the subject.",
        "Do you have feelings?",
        "You are funny.",
        "It is raining here again.",
        "What a long day it was.",
        "Could you give me an example?",
        "I disagree.",
        "Please be shorter.",
        "Do you like music?",
        "I have to go soon.",
        "Sorry, I meant something else.",
        "Where were we?",
        "Never mind.",
    ),
    "never told": (
        "What is my shoe size?",
        "How old am I?",
        "Do I wear glasses?",
        "What is the name of my goldfish?",
        "Which car do I have?",
        "Who is my favourite singer?",
        "What did I have for breakfast?",
        "How tall am I?",
        "Which languages do I speak?",
        "What is my star sign?",
        "Where did I go to university?",
        "When does my insurance end?",
        "What is my middle name?",
        "Which team do I support?",
        "What do I take in my coffee?",
        "How many children do I have?",
    ),
}
