"""Words that the built-in tasks choose from: data, with the paper that each list follows."""

from __future__ import annotations


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _number_pairs(text: str) -> tuple[tuple[str, str], ...]:
    """(singular, plural) of each "one/many"."""
    return tuple((one, many) for one, _, many in (pair.partition("/") for pair in text.split()))


# Frequent first names, places and objects (Wang et al. 2022, arXiv 2211.00593, appendix A).
NAMES = _listed(
    """
    Michael Christopher Jessica Matthew Ashley Jennifer Joshua Amanda Daniel David James Robert John Joseph
    Andrew Ryan Brandon Jason Justin Sarah William Jonathan Stephanie Brian Nicole Nicholas Anthony Heather Eric
    Elizabeth Adam Megan Melissa Kevin Steven Thomas Timothy Christina Kyle Rachel Laura Lauren Amber Brittany
    Danielle Richard Kimberly Jeffrey Amy Crystal Michelle Tiffany Jeremy Benjamin Mark Emily Aaron Charles
    Rebecca Jacob Stephen Patrick Sean Erin Jamie Kelly Samantha Nathan Sara Dustin Paul Angela Tyler Scott
    Katherine Andrea Gregory Erica Mary Travis Lisa Kenneth Bryan Lindsey Kristen Jose Alexander Jesse Katie
    Lindsay Shannon Vanessa Courtney Christine Alicia Cody Allison Bradley Samuel
    """
)
PLACES = _listed(
    """
    store garden restaurant school hospital office house station
    """
)
GIFTS = _listed(
    """
    ring kiss bone basketball computer necklace drink snack
    """
)

# Names that are given to one gender nearly always.
MALE_NAMES = _listed(
    """
    Michael Christopher Matthew Joshua Daniel David James Robert John Joseph Andrew Ryan Brandon Jason Justin
    William Jonathan Brian Nicholas Anthony Eric Adam Kevin Steven Thomas Timothy Richard Jeffrey Jeremy
    Benjamin Mark Aaron Charles Jacob Stephen Patrick Nathan Paul Scott Gregory Kenneth Samuel George Edward
    Henry Peter Simon Jack Arthur Frank Walter Harold Albert Philip Carl Ralph Louis Roy Bruce Alan Keith Roger
    """
)
FEMALE_NAMES = _listed(
    """
    Jessica Ashley Jennifer Amanda Sarah Stephanie Nicole Heather Elizabeth Megan Melissa Christina Rachel Laura
    Lauren Brittany Danielle Kimberly Amy Michelle Tiffany Emily Rebecca Samantha Sara Angela Katherine Erica
    Mary Lisa Katie Vanessa Christine Alicia Allison Anna Emma Alice Julia Susan Linda Barbara Margaret Helen
    Nancy Karen Ruth Sandra Carol Diane Maria Jane Martha Anne Sophie Grace Olivia Hannah Catherine
    """
)

# Things that last (Hanna et al. 2023, arXiv 2305.00586).
LASTING_NOUNS = _listed(
    """
    abduction accord affair agreement appraisal assaults assessment attack attempts campaign captivity case
    challenge chaos clash collaboration coma competition confrontation consequence conspiracy construction
    consultation contact contract convention cooperation custody deal decline decrease demonstrations
    development disagreement disorder dispute domination dynasty effect effort employment endeavor engagement
    epidemic evaluation exchange existence expansion expedition experiments fall fame flights friendship growth
    hardship hostility illness impact imprisonment improvement incarceration increase insurgency invasion
    investigation journey kingdom marriage modernization negotiation notoriety obstruction operation order
    outbreak outcome overhaul patrols pilgrimage plague plan practice process program progress project pursuit
    quest raids reforms reign relationship retaliation riot rise rivalry romance rule sanctions shift siege
    slump stature stint strikes study test testing tests therapy tour tradition treaty trial trip unemployment
    voyage war warfare work
    """
)

# Function and argument names, and words for descriptions (Heimersheim & Janiak 2023, a circuit for Python docstrings).
ARGUMENT_NAMES = _listed(
    """
    data name file value test new result line user key default request path output node item url model response
    text version function log string field start number values sub index error current context image message
    check json create size event state row obj parser end files form query fields instance label run action
    target array code num table source msg config first required options ret update module status group content
    client filename results last read command val base format color settings order found count match tag title
    parent call session token server host date description mode expected project info valid page header option
    task shape load names port old resource root
    """
)
DESCRIPTION_NOUNS = _listed(
    """
    price control cost issue process position course minute education type research subject age father force
    matter health lot street patient class mind church condition paper bank century section activity building
    sense sort staff team student language town plan management morning committee product practice evidence
    ground letter foot game food union role land art support range stage trade voice arm club history account
    material care manager record example training window air light quality rule story tax worker nature bed
    hospital method unit detail wall computer amount president chapter property director leader south
    application board king production operation share contract picture security election future site loss shop
    animal heart purpose standard doctor factor hair love music charge pattern design piece population tree
    knowledge performance plant pressure fire environment analysis rest success thought region relation space
    statement demand sea step capital choice player station film feature income cup technology machine cell
    degree energy growth treatment risk sound floor science style hall horse
    """
)

# Things with colours (BIG-bench "reasoning about colored objects", Srivastava et al. 2022, arXiv 2206.04615).
COLORS = _listed(
    """
    red orange yellow green blue purple pink brown black white gray silver gold
    """
)
SMALL_THINGS = _listed(
    """
    pencil notebook pen cup plate jug mug puzzle textbook leash necklace bracelet bottle ball envelope lighter
    bowl book ring key box bag hat phone lamp
    """
)
SURFACES = _listed(
    """
    table desk floor shelf bed
    """
)

# People, animals and things as subjects; things that can stand near them.
SUBJECTS = _number_pairs(
    """
    teacher/teachers doctor/doctors student/students author/authors friend/friends manager/managers
    officer/officers farmer/farmers driver/drivers artist/artists singer/singers lawyer/lawyers worker/workers
    girl/girls boy/boys guard/guards writer/writers actor/actors leader/leaders player/players key/keys
    picture/pictures car/cars house/houses book/books letter/letters flower/flowers bottle/bottles bird/birds
    horse/horses dog/dogs cat/cats ship/ships machine/machines toy/toys chair/chairs
    """
)
LANDMARKS = _number_pairs(
    """
    cabinet/cabinets window/windows table/tables door/doors building/buildings tree/trees garden/gardens
    river/rivers wall/walls road/roads tower/towers bridge/bridges box/boxes field/fields shop/shops
    school/schools mountain/mountains lake/lakes church/churches gate/gates
    """
)
