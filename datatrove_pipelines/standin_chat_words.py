"""The words and sentences of the embedded chats in six languages.

Each language has the same keys. Nouns are chosen so that sentences need no agreement beyond what is
written here: Spanish, Italian and Portuguese things are masculine, French ones begin with a
consonant, and counts start at two.
"""

from dataclasses import dataclass

__all__ = ["LANGUAGES", "NAMES", "PLACES", "Language"]

NAMES = ("Anna", "Ben", "Clara", "David", "Eva", "Felix", "Laura", "Leo", "Marta", "Nina", "Oscar", "Paul")  # fmt: skip
# Cities spelt alike in all six languages.
PLACES = ("Paris", "Madrid", "Oslo", "Dublin", "Lima", "Quito", "Boston", "Kiel", "Nice", "Bonn")


@dataclass(frozen=True)
class Language:
    """What a task says in one language; fields in braces are filled by standin_chat_tasks.py."""

    trace: str  # how reasoning begins
    openers: tuple[str, ...]  # before a question: the same fact is asked in several wordings
    things: tuple[str, ...]
    gain: str
    loss: str
    owns: str
    plain_sum: str
    sum_is: str
    largest: str
    smallest: str
    largest_is: str
    smallest_is: str
    capital: str
    capital_is: str
    capitals: tuple[tuple[str, str], ...]
    opposite: str
    opposite_is: str
    opposites: tuple[tuple[str, str], ...]
    day: str
    day_is: str
    days: tuple[str, ...]
    greetings: tuple[str, ...]
    introduction: str
    welcome: str
    lives: str
    where: str


LANGUAGES = {
    "en": Language(
        trace="Let me see:",
        openers=("", "Hello! ", "Please tell me: ", "Quick question: ", "I am {name}. ", "{name} asks: "),
        things=("apples", "books", "pens", "balls", "eggs", "coins"),
        gain="{name} has {a} {things} and gets {b} more. How many {things} does {name} have?",
        loss="{name} has {a} {things} and gives {b} away. How many {things} does {name} have?",
        owns="{name} has {c} {things}.",
        plain_sum="What is {sum}?",
        sum_is="The result is {c}.",
        largest="Which number is the largest: {numbers}?",
        smallest="Which number is the smallest: {numbers}?",
        largest_is="The largest number is {n}.",
        smallest_is="The smallest number is {n}.",
        capital="What is the capital of {country}?",
        capital_is="The capital of {country} is {city}.",
        capitals=(
            ("France", "Paris"), ("Spain", "Madrid"), ("Italy", "Rome"), ("Germany", "Berlin"),
            ("Portugal", "Lisbon"), ("Japan", "Tokyo"), ("Norway", "Oslo"), ("Peru", "Lima"),
        ),
        opposite="What is the opposite of “{word}”?",
        opposite_is="The opposite of “{word}” is “{other}”.",
        opposites=(
            ("big", "small"), ("hot", "cold"), ("long", "short"), ("good", "bad"),
            ("day", "night"), ("open", "closed"), ("high", "low"), ("full", "empty"),
        ),
        day="Which day comes after {day}?",
        day_is="After {day} comes {next}.",
        days=("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        greetings=("Hello", "Hi", "Good morning", "Good evening"),
        introduction="{greeting}, I am {name}.",
        welcome="Hello {name}, how can I help?",
        lives="{name} lives in {city}.",
        where="Where does {name} live?",
    ),
    "fr": Language(
        trace="Voyons :",
        openers=("", "Bonjour ! ", "Dis-moi : ", "Une question : ", "Je suis {name}. ", "{name} demande : "),
        things=("pommes", "livres", "stylos", "balles", "roses", "billes"),
        gain="{name} a {a} {things} et en reçoit {b}. Combien de {things} a {name} ?",
        loss="{name} a {a} {things} et en donne {b}. Combien de {things} a {name} ?",
        owns="{name} a {c} {things}.",
        plain_sum="Combien font {sum} ?",
        sum_is="Le résultat est {c}.",
        largest="Quel nombre est le plus grand : {numbers} ?",
        smallest="Quel nombre est le plus petit : {numbers} ?",
        largest_is="Le plus grand nombre est {n}.",
        smallest_is="Le plus petit nombre est {n}.",
        capital="Quelle est la capitale {country} ?",
        capital_is="La capitale {country} est {city}.",
        capitals=(
            ("de la France", "Paris"), ("de l'Espagne", "Madrid"), ("de l'Italie", "Rome"),
            ("de l'Allemagne", "Berlin"), ("du Portugal", "Lisbonne"), ("du Japon", "Tokyo"),
            ("de la Norvège", "Oslo"), ("du Pérou", "Lima"),
        ),
        opposite="Quel est le contraire de « {word} » ?",
        opposite_is="Le contraire de « {word} » est « {other} ».",
        opposites=(
            ("grand", "petit"), ("chaud", "froid"), ("long", "court"), ("bon", "mauvais"),
            ("jour", "nuit"), ("ouvert", "fermé"), ("haut", "bas"), ("plein", "vide"),
        ),
        day="Quel jour vient après {day} ?",
        day_is="Après {day} vient {next}.",
        days=("lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"),
        greetings=("Bonjour", "Salut", "Bonsoir", "Coucou"),
        introduction="{greeting}, je suis {name}.",
        welcome="Bonjour {name}, comment puis-je aider ?",
        lives="{name} habite à {city}.",
        where="Où habite {name} ?",
    ),
    "es": Language(
        trace="A ver:",
        openers=("", "¡Hola! ", "Dime: ", "Una pregunta: ", "Soy {name}. ", "{name} pregunta: "),
        things=("libros", "globos", "huevos", "lápices", "vasos", "platos"),
        gain="{name} tiene {a} {things} y recibe {b} más. ¿Cuántos {things} tiene {name}?",
        loss="{name} tiene {a} {things} y regala {b}. ¿Cuántos {things} tiene {name}?",
        owns="{name} tiene {c} {things}.",
        plain_sum="¿Cuánto es {sum}?",
        sum_is="El resultado es {c}.",
        largest="¿Qué número es el mayor: {numbers}?",
        smallest="¿Qué número es el menor: {numbers}?",
        largest_is="El número mayor es {n}.",
        smallest_is="El número menor es {n}.",
        capital="¿Cuál es la capital de {country}?",
        capital_is="La capital de {country} es {city}.",
        capitals=(
            ("Francia", "París"), ("España", "Madrid"), ("Italia", "Roma"), ("Alemania", "Berlín"),
            ("Portugal", "Lisboa"), ("Japón", "Tokio"), ("Noruega", "Oslo"), ("Perú", "Lima"),
        ),
        opposite="¿Qué es lo contrario de «{word}»?",
        opposite_is="Lo contrario de «{word}» es «{other}».",
        opposites=(
            ("grande", "pequeño"), ("caliente", "frío"), ("largo", "corto"), ("bueno", "malo"),
            ("día", "noche"), ("abierto", "cerrado"), ("alto", "bajo"), ("lleno", "vacío"),
        ),
        day="¿Qué día viene después del {day}?",
        day_is="Después del {day} viene el {next}.",
        days=("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo"),
        greetings=("Hola", "Buenos días", "Buenas tardes", "Buenas noches"),
        introduction="{greeting}, soy {name}.",
        welcome="Hola, {name}, ¿cómo puedo ayudar?",
        lives="{name} vive en {city}.",
        where="¿Dónde vive {name}?",
    ),
    "de": Language(
        trace="Also:",
        openers=("", "Hallo! ", "Sag mir: ", "Eine Frage: ", "Ich bin {name}. ", "{name} fragt: "),
        things=("Bücher", "Stifte", "Bälle", "Eier", "Rosen", "Karten"),
        gain="{name} hat {a} {things} und bekommt {b} dazu. Wie viele {things} hat {name}?",
        loss="{name} hat {a} {things} und gibt {b} ab. Wie viele {things} hat {name}?",
        owns="{name} hat {c} {things}.",
        plain_sum="Was ist {sum}?",
        sum_is="Das Ergebnis ist {c}.",
        largest="Welche Zahl ist die größte: {numbers}?",
        smallest="Welche Zahl ist die kleinste: {numbers}?",
        largest_is="Die größte Zahl ist {n}.",
        smallest_is="Die kleinste Zahl ist {n}.",
        capital="Was ist die Hauptstadt von {country}?",
        capital_is="Die Hauptstadt von {country} ist {city}.",
        capitals=(
            ("Frankreich", "Paris"), ("Spanien", "Madrid"), ("Italien", "Rom"),
            ("Deutschland", "Berlin"), ("Portugal", "Lissabon"), ("Japan", "Tokio"),
            ("Norwegen", "Oslo"), ("Peru", "Lima"),
        ),
        opposite="Was ist das Gegenteil von „{word}“?",
        opposite_is="Das Gegenteil von „{word}“ ist „{other}“.",
        opposites=(
            ("groß", "klein"), ("heiß", "kalt"), ("lang", "kurz"), ("gut", "schlecht"),
            ("Tag", "Nacht"), ("offen", "geschlossen"), ("hoch", "niedrig"), ("voll", "leer"),
        ),
        day="Welcher Tag kommt nach {day}?",
        day_is="Nach {day} kommt {next}.",
        days=("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"),
        greetings=("Hallo", "Guten Tag", "Guten Morgen", "Guten Abend"),
        introduction="{greeting}, ich bin {name}.",
        welcome="Hallo {name}, wie kann ich helfen?",
        lives="{name} wohnt in {city}.",
        where="Wo wohnt {name}?",
    ),
    "it": Language(
        trace="Dunque:",
        openers=("", "Ciao! ", "Dimmi: ", "Una domanda: ", "Sono {name}. ", "{name} chiede: "),
        things=("libri", "fiori", "palloni", "biscotti", "piatti", "quaderni"),
        gain="{name} ha {a} {things} e ne riceve {b}. Quanti {things} ha {name}?",
        loss="{name} ha {a} {things} e ne regala {b}. Quanti {things} ha {name}?",
        owns="{name} ha {c} {things}.",
        plain_sum="Quanto fa {sum}?",
        sum_is="Il risultato è {c}.",
        largest="Quale numero è il più grande: {numbers}?",
        smallest="Quale numero è il più piccolo: {numbers}?",
        largest_is="Il numero più grande è {n}.",
        smallest_is="Il numero più piccolo è {n}.",
        capital="Qual è la capitale {country}?",
        capital_is="La capitale {country} è {city}.",
        capitals=(
            ("della Francia", "Parigi"), ("della Spagna", "Madrid"), ("dell'Italia", "Roma"),
            ("della Germania", "Berlino"), ("del Portogallo", "Lisbona"), ("del Giappone", "Tokyo"),
            ("della Norvegia", "Oslo"), ("del Perù", "Lima"),
        ),
        opposite="Qual è il contrario di «{word}»?",
        opposite_is="Il contrario di «{word}» è «{other}».",
        opposites=(
            ("grande", "piccolo"), ("caldo", "freddo"), ("lungo", "corto"), ("buono", "cattivo"),
            ("giorno", "notte"), ("aperto", "chiuso"), ("alto", "basso"), ("pieno", "vuoto"),
        ),
        day="Quale giorno viene dopo {day}?",
        day_is="Dopo {day} viene {next}.",
        days=("lunedì", "martedì", "mercoledì", "giovedì", "venerdì", "sabato", "domenica"),
        greetings=("Ciao", "Salve", "Buongiorno", "Buonasera"),
        introduction="{greeting}, sono {name}.",
        welcome="Ciao {name}, come posso aiutare?",
        lives="{name} vive a {city}.",
        where="Dove vive {name}?",
    ),
    "pt": Language(
        trace="Bem:",
        openers=("", "Olá! ", "Diga-me: ", "Uma pergunta: ", "Eu sou {name}. ", "{name} pergunta: "),
        things=("livros", "ovos", "copos", "lápis", "pratos", "cadernos"),
        gain="{name} tem {a} {things} e recebe mais {b}. Quantos {things} tem {name}?",
        loss="{name} tem {a} {things} e oferece {b}. Quantos {things} tem {name}?",
        owns="{name} tem {c} {things}.",
        plain_sum="Quanto é {sum}?",
        sum_is="O resultado é {c}.",
        largest="Qual número é o maior: {numbers}?",
        smallest="Qual número é o menor: {numbers}?",
        largest_is="O número maior é {n}.",
        smallest_is="O número menor é {n}.",
        capital="Qual é a capital {country}?",
        capital_is="A capital {country} é {city}.",
        capitals=(
            ("da França", "Paris"), ("da Espanha", "Madrid"), ("da Itália", "Roma"),
            ("da Alemanha", "Berlim"), ("de Portugal", "Lisboa"), ("do Japão", "Tóquio"),
            ("da Noruega", "Oslo"), ("do Peru", "Lima"),
        ),
        opposite="Qual é o contrário de «{word}»?",
        opposite_is="O contrário de «{word}» é «{other}».",
        opposites=(
            ("grande", "pequeno"), ("quente", "frio"), ("longo", "curto"), ("bom", "mau"),
            ("dia", "noite"), ("aberto", "fechado"), ("alto", "baixo"), ("cheio", "vazio"),
        ),
        day="Que dia vem depois de {day}?",
        day_is="Depois de {day} vem {next}.",
        days=("segunda", "terça", "quarta", "quinta", "sexta", "sábado", "domingo"),
        greetings=("Olá", "Bom dia", "Boa tarde", "Boa noite"),
        introduction="{greeting}, eu sou {name}.",
        welcome="Olá {name}, como posso ajudar?",
        lives="{name} vive em {city}.",
        where="Onde vive {name}?",
    ),
}  # fmt: skip
