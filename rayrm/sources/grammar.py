"""A small grammar that writes parallel sentences in English, German, Russian and Spanish.

A meaning has exactly one sentence in each language, and a sentence exactly one meaning: articles, adjectives and verbs
agree in gender, case and tense, and the languages order their parts differently.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
from pydantic import Field, field_validator

from rayrm.config import Config

FOREIGN = ("de", "ru", "es")
CORPUS = pa.schema([(name, pa.string()) for name in ("src_text", "trg_text", "src_lang", "trg_lang")])

# English; German stem and kind of endings; Russian m, f, n, accusative f; Spanish m, f.
_DETERMINERS = """
this | dies strong | этот эта это эту | este esta
that | jen strong | тот та то ту | aquel aquella
every | jed strong | каждый каждая каждое каждую | cada cada
my | mein mixed | мой моя моё мою | mi mi
our | unser mixed | наш наша наше нашу | nuestro nuestra
"""
# English; German stem; Russian m; Spanish m.
_OF_PERSONS = """
old | alt | старый | viejo
young | jung | молодой | joven
small | klein | маленький | pequeño
strange | seltsam | странный | extraño
tired | müd | усталый | cansado
happy | glücklich | счастливый | feliz
poor | arm | бедный | pobre
rich | reich | богатый | rico
clever | klug | умный | inteligente
"""
_OF_THINGS = """
old | alt | старый | viejo
small | klein | маленький | pequeño
big | groß | большой | grande
new | neu | новый | nuevo
beautiful | schön | красивый | hermoso
heavy | schwer | тяжёлый | pesado
cheap | billig | дешёвый | barato
red | rot | красный | rojo
black | schwarz | чёрный | negro
white | weiß | белый | blanco
green | grün | зелёный | verde
"""
# English; German with gender; Russian nominative, accusative (things) and gender; Spanish with gender.
_PERSONS = """
man | Mann m | мужчина мужчину m | hombre m
woman | Frau f | женщина женщину f | mujer f
child | Kind n | ребёнок ребёнка m | niño m
girl | Mädchen n | девочка девочку f | niña f
teacher | Lehrer m | учитель учителя m | profesor m
doctor | Arzt m | врач врача m | médico m
sister | Schwester f | сестра сестру f | hermana f
brother | Bruder m | брат брата m | hermano m
aunt | Tante f | тётя тётю f | tía f
uncle | Onkel m | дядя дядю m | tío m
farmer | Bauer m | фермер фермера m | granjero m
queen | Königin f | королева королеву f | reina f
"""
_THINGS = """
book | Buch n | книга книгу f | libro m
letter | Brief m | письмо письмо n | carta f
picture | Bild n | картина картину f | cuadro m
apple | Apfel m | яблоко яблоко n | manzana f
bag | Tasche f | сумка сумку f | bolsa f
table | Tisch m | стол стол m | mesa f
lamp | Lampe f | лампа лампу f | lámpara f
house | Haus n | дом дом m | casa f
flower | Blume f | цветок цветок m | flor f
hat | Hut m | шляпа шляпу f | sombrero m
key | Schlüssel m | ключ ключ m | llave f
car | Auto n | машина машину f | coche m
window | Fenster n | окно окно n | ventana f
coat | Mantel m | пальто пальто n | abrigo m
"""
# Present and past of the third person; the Russian past is the masculine one.
_WITH_OBJECT = """
sees saw | sieht sah | видит видел | ve vio
buys bought | kauft kaufte | покупает покупал | compra compró
sells sold | verkauft verkaufte | продаёт продавал | vende vendió
draws drew | zeichnet zeichnete | рисует рисовал | dibuja dibujó
finds found | findet fand | находит находил | encuentra encontró
hides hid | versteckt versteckte | прячет прятал | esconde escondió
shows showed | zeigt zeigte | показывает показывал | muestra mostró
loves loved | liebt liebte | любит любил | ama amó
cleans cleaned | putzt putzte | чистит чистил | limpia limpió
describes described | beschreibt beschrieb | описывает описывал | describe describió
forgets forgot | vergisst vergaß | забывает забывал | olvida olvidó
brings brought | bringt brachte | приносит приносил | trae trajo
"""
_WITHOUT_OBJECT = """
sleeps slept | schläft schlief | спит спал | duerme durmió
works worked | arbeitet arbeitete | работает работал | trabaja trabajó
waits waited | wartet wartete | ждёт ждал | espera esperó
sings sang | singt sang | поёт пел | canta cantó
dances danced | tanzt tanzte | танцует танцевал | baila bailó
"""
_PLACES = """
in the garden | im Garten | в саду | en el jardín
at school | in der Schule | в школе | en la escuela
in the kitchen | in der Küche | на кухне | en la cocina
on the street | auf der Straße | на улице | en la calle
at the market | auf dem Markt | на рынке | en el mercado
in the forest | im Wald | в лесу | en el bosque
by the river | am Fluss | у реки | junto al río
"""
_PRESENT_TIMES = """
today | heute | сегодня | hoy
now | jetzt | сейчас | ahora
every day | jeden Tag | каждый день | todos los días
"""
_PAST_TIMES = """
yesterday | gestern | вчера | ayer
last week | letzte Woche | на прошлой неделе | la semana pasada
"""
_AND = "and | und | и | y"

_GERMAN_ENDINGS = {
    "strong": {"nom": {"m": "er", "f": "e", "n": "es"}, "acc": {"m": "en", "f": "e", "n": "es"}},
    "mixed": {"nom": {"m": "", "f": "e", "n": ""}, "acc": {"m": "en", "f": "e", "n": ""}},
}
_GERMAN_ADJECTIVE_ENDINGS = {
    "strong": {"nom": {"m": "e", "f": "e", "n": "e"}, "acc": {"m": "en", "f": "e", "n": "e"}},
    "mixed": {"nom": {"m": "er", "f": "e", "n": "es"}, "acc": {"m": "en", "f": "e", "n": "es"}},
}
_RUSSIAN_ADJECTIVE_ENDINGS = {"f": "ая", "n": "ое", "acc f": "ую"}
_RUSSIAN_DETERMINER_FORMS = {"m": 0, "f": 1, "n": 2, "acc f": 3}
_COLUMNS = {"en": 0, "de": 1, "ru": 2, "es": 3}


class Entry(NamedTuple):
    """A line of the lexicon."""

    line: str

    def forms(self, lang: str) -> list[str]:
        """The words of one language."""
        return self.line.split(" | ")[_COLUMNS[lang]].split()


class Phrase(NamedTuple):
    """A determiner, perhaps an adjective, and a noun."""

    determiner: Entry
    adjective: Entry | None
    noun: Entry


class Meaning(NamedTuple):
    """What one sentence says, in no language."""

    subject: Phrase
    verb: Entry
    is_past: bool
    objects: tuple[Phrase, ...] = ()
    place: Entry | None = None
    time: Entry | None = None


class GrammarConfig(Config):
    """How large the corpus is."""

    num_sentences: int = Field(1200, ge=1, le=1_000_000)
    """Different English sentences; each stands once in every language pair and direction."""
    languages: tuple[str, ...] = FOREIGN
    """Languages beside English; preferences may do without any."""
    seed: int = 0
    """Seed of the draw of sentences."""

    @field_validator("languages")
    @classmethod
    def _check_languages(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        if not set(languages) <= set(FOREIGN):
            raise ValueError(f"the grammar has {', '.join(FOREIGN)}")
        return languages


def write_sentences(config: GrammarConfig) -> pa.Table:
    """Parallel rows (`src_text`, `trg_text`, `src_lang`, `trg_lang`): every sentence in all pairs with English."""
    rows = []
    for meaning in draw_meanings(config):
        english = render_sentence(meaning, "en")
        for lang in config.languages:
            foreign = render_sentence(meaning, lang)
            rows.append({"src_text": english, "trg_text": foreign, "src_lang": "en", "trg_lang": lang})
            rows.append({"src_text": foreign, "trg_text": english, "src_lang": lang, "trg_lang": "en"})
    return pa.Table.from_pylist(rows, CORPUS)


def draw_meanings(config: GrammarConfig) -> Iterator[Meaning]:
    """`num_sentences` different meanings; a longer draw begins with the shorter one of the same seed."""
    rng = random.Random(config.seed)
    seen: set[Meaning] = set()
    while len(seen) < config.num_sentences:
        meaning = draw_meaning(rng)
        if meaning not in seen:
            seen.add(meaning)
            yield meaning


def render_sentence(meaning: Meaning, lang: str) -> str:
    """The one sentence of `lang` (en, de, ru or es) for a meaning, of 4 to 12 words."""
    verb = meaning.verb.forms(lang)[meaning.is_past]
    if lang == "ru" and meaning.is_past and meaning.subject.noun.forms("ru")[-1] == "f":
        verb += "а"
    subject = _render_phrase(meaning.subject, lang, "nom")
    objects = [_render_phrase(phrase, lang, "acc") for phrase in meaning.objects]
    thing = f" {Entry(_AND).forms(lang)[0]} ".join(objects)
    place, time = (" ".join(entry.forms(lang)) if entry else "" for entry in (meaning.place, meaning.time))
    order = {
        "en": (subject, verb, thing, place, time),
        "de": (subject, verb, time, thing, place),
        "ru": (time, subject, verb, thing, place),
        "es": (subject, verb, thing, place, time),
    }[lang]
    text = " ".join(part for part in order if part)
    return text[0].upper() + text[1:] + "."


def _render_phrase(phrase: Phrase, lang: str, case: str) -> str:
    determiner, noun = phrase.determiner.forms(lang), phrase.noun.forms(lang)
    adjective = phrase.adjective.forms(lang)[0] if phrase.adjective else ""
    if lang == "en":
        words = [determiner[0], adjective, noun[0]]
    elif lang == "de":
        stem, kind = determiner
        ending = _GERMAN_ENDINGS[kind][case][noun[-1]]
        adjective = adjective and adjective + _GERMAN_ADJECTIVE_ENDINGS[kind][case][noun[-1]]
        words = [stem + ending, adjective, noun[0]]
    elif lang == "ru":
        form = "acc f" if (case, noun[-1]) == ("acc", "f") else noun[-1]
        if adjective and form != "m":
            adjective = adjective[:-2] + _RUSSIAN_ADJECTIVE_ENDINGS[form]
        words = [determiner[_RUSSIAN_DETERMINER_FORMS[form]], adjective, noun[case == "acc"]]
    else:
        is_feminine = noun[-1] == "f"
        if is_feminine and adjective.endswith("o"):
            adjective = adjective[:-1] + "a"
        words = [determiner[is_feminine], noun[0], adjective]
    return " ".join(word for word in words if word)


def _read(table: str) -> tuple[Entry, ...]:
    return tuple(Entry(line) for line in table.strip().splitlines())


_LEXICON = {
    "determiner": _read(_DETERMINERS),
    "person": _read(_PERSONS),
    "thing": _read(_THINGS),
    "of person": _read(_OF_PERSONS),
    "of thing": _read(_OF_THINGS),
    "with object": _read(_WITH_OBJECT),
    "without object": _read(_WITHOUT_OBJECT),
    "place": _read(_PLACES),
    "present": _read(_PRESENT_TIMES),
    "past": _read(_PAST_TIMES),
}


def draw_meaning(rng: random.Random) -> Meaning:
    """Any meaning."""

    def pick(name: str) -> Entry:
        return rng.choice(_LEXICON[name])

    def phrase(kind: str, adjectives: float) -> Phrase:
        adjective = pick(f"of {kind}") if rng.random() < adjectives else None
        return Phrase(pick("determiner"), adjective, pick(kind))

    is_past = rng.random() < 0.5
    subject = phrase("person", 0.5)
    time = pick("past" if is_past else "present")
    if rng.random() < 0.2:
        return Meaning(
            subject, pick("without object"), is_past, (), pick("place"), time if rng.random() < 0.5 else None
        )
    meaning = Meaning(subject, pick("with object"), is_past, (phrase("thing", 0.6),))
    tail = rng.choice(("", "place", "time", "and"))
    if tail == "place":
        return meaning._replace(place=pick("place"))
    if tail == "time":
        return meaning._replace(time=time)
    return meaning._replace(objects=(*meaning.objects, phrase("thing", 0.0))) if tail else meaning
