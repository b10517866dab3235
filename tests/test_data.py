"""What the datasets promise, on trees of a few files: whole rows, nothing broken, no name in two parts of the split."""

from __future__ import annotations

import io
import json
import logging
import struct
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modeling_sail.training.data import DATASETS, load_emoji, load_openclipart, load_tuxpaint
from modeling_sail.training.data.__main__ import prepare_all
from modeling_sail.training.data.gcompris import ACTIVITIES, ResourceArchive, load_gcompris, spelled_out
from modeling_sail.training.data.pictures import is_picture
from modeling_sail.training.data.tuxpaint import name_key, split_by_name
from PIL import Image


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)


def stamp(folder: Path, name: str, text: str, sounds: tuple[str, ...] = ()) -> None:
    picture(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    for sound in sounds:
        (folder / f"{name}{sound}").write_bytes(b"RIFF...." if sound.endswith("wav") else b"OggS....")


def rows_named(*names: str) -> list[dict]:
    return [{"id": str(index), "names": {"en": name}} for index, name in enumerate(names)]


# --- Tux Paint ------------------------------------------------------------------------------------------------------


def test_a_stamp_becomes_a_row_with_names_speech_and_effect(tmp_path: Path) -> None:
    folder = tmp_path / "animals" / "birds"
    text = "A cockatoo.\nfr.utf8=Un cacatoès.\nca@valencia.utf8=Una cacatua.\nde.utf8=\n"
    stamp(folder, "cockatoo", text, ("_desc.ogg", "_desc_fr.ogg", ".wav"))
    (row,) = load_tuxpaint(tmp_path)
    assert row["id"] == "tuxpaint/animals/birds/cockatoo" and row["category"] == "animals/birds"
    assert row["names"] == {"en": "A cockatoo.", "fr": "Un cacatoès.", "ca@valencia": "Una cacatua."}
    assert set(row["speech"]) == {"en", "fr"} and row["speech"]["fr"].endswith("cockatoo_desc_fr.ogg")
    assert row["effect"].endswith("cockatoo.wav") and Path(row["image"]).is_file()


def test_a_stamp_does_not_take_the_speech_of_its_neighbour(tmp_path: Path) -> None:
    stamp(tmp_path / "a", "cat", "A cat.")
    stamp(tmp_path / "a", "cat_2", "Another cat.", ("_desc_fr.ogg",))
    assert [set(row["speech"]) for row in load_tuxpaint(tmp_path)] == [set(), {"fr"}]


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rendered drawings go to the cache: not to the developer's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SAIL_CACHE", str(folder))
    return folder


def test_a_drawing_is_rendered_once(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "a").mkdir()
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8" fill="red"/></svg>'
    )
    (tmp_path / "a" / "drawn.svg").write_text(drawing)
    (tmp_path / "a" / "drawn.txt").write_text("Drawn.")
    (row,) = load_tuxpaint(tmp_path)
    with Image.open(row["image"]) as image:
        assert image.convert("RGB").getpixel((100, 100)) == (255, 0, 0)
    before = Path(row["image"]).stat().st_mtime_ns
    assert load_tuxpaint(tmp_path) == [row] and Path(row["image"]).stat().st_mtime_ns == before
    assert own_cache in Path(row["image"]).parents


def test_broken_stamps_are_left_out_and_counted(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stamp(tmp_path / "a", "good", "Good.", ("_desc_fr.ogg",))
    stamp(tmp_path / "a", "nameless", "\nfr.utf8=Un chat.\n")
    stamp(tmp_path / "a", "broken", "Broken.")
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    stamp(tmp_path / "a", "scribble", "No drawing.")
    (tmp_path / "a" / "scribble.png").rename(tmp_path / "a" / "scribble.svg")
    stamp(tmp_path / "a", "blind", "Blind.")
    (tmp_path / "a" / "blind.png").unlink()
    (tmp_path / "a" / "good_desc_fr.ogg").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        (row,) = load_tuxpaint(tmp_path)
    assert row["names"]["en"] == "Good." and row["speech"] == {}
    assert all(
        reason in caplog.text for reason in ("1 without a picture", "2 with a broken", "1 without an English name")
    )


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tuxpaint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "key"),
    [("A cat.", "cat"), ("The  CAT!", "cat"), ("cat", "cat"), ("A", "a"), ("?", "?"), ("A-Team", "team")],
)
def test_names_that_mean_the_same_have_one_key(name: str, key: str) -> None:
    assert name_key(name) == key


def test_the_key_keeps_the_marks_that_make_syllables() -> None:
    assert name_key("हाथी।") == "हाथी"


@given(st.lists(st.text(min_size=1), min_size=1))
def test_a_split_loses_no_row_and_shares_no_name(names: list[str]) -> None:
    rows = rows_named(*names, "zz first", "zz second", "zz third")
    parts = split_by_name(rows, test_names=1, validation_names=1)
    assert sorted(row["id"] for part in parts.values() for row in part) == sorted(row["id"] for row in rows)
    keys = {part: {name_key(row["names"]["en"]) for row in members} for part, members in parts.items()}
    assert len(keys["test"]) == len(keys["validation"]) == 1
    assert not (keys["test"] & keys["train"] or keys["test"] & keys["validation"] or keys["validation"] & keys["train"])


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    rows = rows_named(*(f"name {index}" for index in range(50)))
    names = [
        {row["names"]["en"] for row in split_by_name(given_rows, 20, 5, seed)["test"]}
        for given_rows, seed in ((rows, 0), (rows[::-1], 0), (rows, 1))
    ]
    assert names[0] == names[1] != names[2]


def test_a_split_without_training_names_is_refused() -> None:
    with pytest.raises(ValueError, match="2 distinct names"):
        split_by_name(rows_named("a b", "c d", "A B."), test_names=1, validation_names=1)


# --- openclipart ----------------------------------------------------------------------------------------------------

SVG = """<svg xmlns="http://www.w3.org/2000/svg"><metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/"
xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work>
<dc:publisher><cc:Agent><dc:title>The Library</dc:title></cc:Agent></dc:publisher><dc:title>{title}</dc:title>
<dc:subject><rdf:Bag><rdf:li>animal</rdf:li><rdf:li>hash(0x81)</rdf:li><rdf:li></rdf:li><rdf:li>red_fox</rdf:li></rdf:Bag>
</dc:subject></cc:Work></rdf:RDF></metadata><g/></svg>"""


def clipart(root: Path, name: str, title: str) -> None:
    picture(root / "png" / f"{name}.png")
    drawing = root / "svg" / f"{name}.svg"
    drawing.parent.mkdir(parents=True, exist_ok=True)
    drawing.write_text(SVG.format(title=title), encoding="utf-8")


def test_titles_and_tags_come_from_the_drawing(tmp_path: Path) -> None:
    clipart(tmp_path, "animals/fox", "Clipart by A. Nyone - sly_fox")
    (row,) = load_openclipart(tmp_path)
    assert row["title"] == "sly fox" and row["tags"] == ["animal", "red fox"]
    assert row["id"] == "openclipart/animals/fox" and row["folder"] == "animals"


def test_shapes_themes_and_titles_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    for folder in ("shapes/stars", "computer/icons/flat-theme/action", "special/patterns", "buttons"):
        clipart(tmp_path, f"{folder}/x", "a title")
    clipart(tmp_path, "food/untitled", "Untitled")
    clipart(tmp_path, "food/number", "12")
    clipart(tmp_path, "food/shapeshifter", "a title")
    clipart(tmp_path, "food/shapeshifter2", "a title")  # the same title twice is two rows
    assert [row["id"] for row in load_openclipart(tmp_path)] == [
        "openclipart/food/shapeshifter",
        "openclipart/food/shapeshifter2",
    ]


def test_a_broken_drawing_costs_its_own_row_only(tmp_path: Path) -> None:
    clipart(tmp_path, "food/good", "good")
    clipart(tmp_path, "food/bad", "bad")
    clipart(tmp_path, "food/lost", "lost")
    (tmp_path / "svg/food/bad.svg").write_text("<svg><metadata>")
    (tmp_path / "svg/food/lost.svg").unlink()
    assert [row["title"] for row in load_openclipart(tmp_path)] == ["good"]


def test_a_huge_picture_is_not_a_picture(tmp_path: Path) -> None:
    Image.new("1", (6000, 6000)).save(tmp_path / "poster.png")
    assert not is_picture(tmp_path / "poster.png")


# --- emoji ----------------------------------------------------------------------------------------------------------


def test_emoji_meet_their_names_in_every_language(tmp_path: Path) -> None:
    for code in ("2764", "2764-fe0f", "1f44b", "1f44b-1f3fb"):
        picture(tmp_path / "assets" / f"{code}.webp")
    skins = [{"hexcode": "1F44B-1F3FB", "label": "waving hand: light skin tone"}]
    texts = {
        "en": [
            {"hexcode": "2764", "label": "red heart", "tags": ["love"]},
            {"hexcode": "1F44B", "label": "waving hand", "skins": skins},
        ],
        "fr": [{"hexcode": "2764", "label": "cœur rouge", "tags": ["amour"]}],
    }
    for language, entries in texts.items():
        (tmp_path / "names" / language).mkdir(parents=True)
        (tmp_path / "names" / language / "compact.json").write_text(json.dumps(entries))
    (tmp_path / "names" / "xx").mkdir()
    (tmp_path / "names" / "xx" / "compact.json").write_text("{ broken")
    wave, heart = load_emoji(tmp_path / "assets", tmp_path / "names")
    assert heart["names"] == {"en": "red heart", "fr": "cœur rouge"} and heart["tags"] == ["love"]
    assert wave["id"] == "emoji/1f44b" and wave["names"] == {"en": "waving hand"} and wave["tags"] == []


def test_emoji_without_english_names_say_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "fr").mkdir()
    with pytest.raises(FileNotFoundError, match="compact.json"):
        load_emoji(tmp_path, tmp_path)


# --- GCompris -------------------------------------------------------------------------------------------------------

STORED, ZLIB, FOLDER, ZSTD = 0, 1, 2, 4
DRAWING = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8" fill="red"/></svg>'


def webp() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "WEBP")
    return buffer.getvalue()


def deflated(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + zlib.compress(content)


def rcc_bytes(folder: str, files: dict[str, bytes | tuple[int, bytes]], version: int = 3) -> bytes:
    """A Qt resource archive with one folder: contents, names and tree after the header, as Qt's rcc writes it."""
    contents = names = tree = b""
    date = b"" if version == 1 else bytes(8)
    parts = folder.split("/")
    for depth, name in enumerate(["", *parts]):
        children = 1 if depth < len(parts) else len(files)
        tree += struct.pack(">IHII", len(names), FOLDER, children, depth + 1) + date
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    for name, given_file in files.items():
        flags, content = given_file if isinstance(given_file, tuple) else (STORED, given_file)
        tree += struct.pack(">IHHHI", len(names), flags, 0, 1, len(contents)) + date
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        contents += struct.pack(">I", len(content)) + content
    header = 20 if version < 3 else 24
    offsets = (header + len(contents) + len(names), header, header + len(contents))
    return (struct.pack(">4sIIII", b"qres", version, *offsets) + bytes(4))[:header] + contents + names + tree


def gcompris(root: Path, **files: dict[str, bytes | tuple[int, bytes]]) -> Path:
    """The archives of all activities, with these files where an activity keeps its pictures."""
    root.mkdir(parents=True, exist_ok=True)
    for activity, inside in ACTIVITIES.items():
        folder = f"gcompris/src/activities/{activity}/{inside}"
        (root / f"{activity}.rcc").write_bytes(rcc_bytes(folder, files.get(activity, {})))
    return root


def test_each_activity_gives_rows_with_names_folders_and_sounds(tmp_path: Path, own_cache: Path) -> None:
    animals = {"polar_bear.webp": webp(), "question.svg": DRAWING, "README": b"by hand"}
    instruments = {"drum_kit.svg": DRAWING, "drum_kit.ogg": b"OggS....", "background.svg": DRAWING}
    words = {"orange-color.webp": webp()}
    gcompris(tmp_path / "usr/share/gcompris-qt/rcc", lang=words, explore_world_animals=animals, instruments=instruments)
    rows = load_gcompris(tmp_path)
    assert [(row["id"], row["names"], row["folder"]) for row in rows] == [
        ("gcompris/explore_world_animals/polar_bear", {"en": "polar bear"}, "explore_world_animals"),
        ("gcompris/instruments/drum_kit", {"en": "drum kit"}, "instruments"),
        ("gcompris/lang/orange-color", {"en": "orange color"}, "lang"),
    ]
    assert [row["sound"] and Path(row["sound"]).name for row in rows] == [None, "drum_kit.ogg", None]
    assert Path(rows[1]["sound"]).read_bytes() == b"OggS...." and is_picture(Path(rows[1]["image"]))
    assert all(own_cache in Path(row["image"]).parents for row in rows)


def test_a_name_has_one_row_of_the_first_activity_and_a_sound_of_any(tmp_path: Path, own_cache: Path) -> None:
    farm = {"chicken.webp": webp(), "chickens.ogg": b"OggS....", "cat.ogg": b"silence", "cat.webp": webp()}
    gcompris(
        tmp_path, lang={"chicken.webp": webp()}, explore_farm_animals=farm, explore_world_animals={"cat.webp": b""}
    )
    cat, chicken = load_gcompris(tmp_path)
    assert chicken["folder"] == "lang" and chicken["sound"].endswith("explore_farm_animals/chickens.ogg")
    assert cat["folder"] == "explore_farm_animals" and cat["sound"] is None  # a broken one keeps no name from the next


def test_a_drawing_is_taken_only_where_no_other_picture_has_the_name(tmp_path: Path, own_cache: Path) -> None:
    gcompris(tmp_path, lang={"cow.svg": DRAWING, "owl.svg": DRAWING}, explore_farm_animals={"cow.webp": webp()})
    assert [(row["folder"], Path(row["image"]).name) for row in load_gcompris(tmp_path)] == [
        ("explore_farm_animals", "cow.webp"),
        ("lang", "owl.png"),
    ]


def test_what_lies_beside_the_pictures_of_an_activity_is_no_row(tmp_path: Path, own_cache: Path) -> None:
    (gcompris(tmp_path) / "lang.rcc").write_bytes(rcc_bytes("gcompris/src/activities/lang", {"lang.svg": DRAWING}))
    assert load_gcompris(tmp_path) == []


def test_pictures_are_unpacked_once_and_other_archives_give_other_files(tmp_path: Path, own_cache: Path) -> None:
    (row,) = load_gcompris(gcompris(tmp_path, lang={"cat.webp": webp()}))
    before = Path(row["image"]).stat().st_mtime_ns
    assert load_gcompris(tmp_path) == [row] and Path(row["image"]).stat().st_mtime_ns == before
    assert not list(own_cache.rglob("*.partial"))
    (other,) = load_gcompris(gcompris(tmp_path, lang={"cat.webp": webp() + b"more"}))
    assert other["image"] != row["image"] and other["id"] == row["id"]


def test_zlib_is_decoded_and_zstd_is_passed_over_and_counted(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {
        "cat.webp": (ZLIB, deflated(webp())),
        "dog.webp": (ZSTD, b"(\xb5/\xfd"),
        "cow.webp": (ZLIB, deflated(webp())[:-9]),
        "pig.webp": (ZLIB, bytes(4) + deflated(webp())[4:]),  # more than it announces
        "owl.webp": (8, webp()),
    }
    with caplog.at_level(logging.INFO):
        (row,) = load_gcompris(gcompris(tmp_path, lang=files))
    assert Path(row["image"]).read_bytes() == webp()
    reasons = ("1 compressed with zstd", "2 with broken zlib", "1 compressed in an unknown way")
    assert all(reason in caplog.text for reason in reasons)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_archive_of_every_version_is_read_and_none_is_read_truncated(tmp_path: Path, version: int) -> None:
    whole, archive = rcc_bytes("a/b", {"c.txt": b"hello", "d.txt": b""}, version), tmp_path / "a.rcc"
    archive.write_bytes(whole)
    files = ResourceArchive(archive).files()
    assert {name: (flags, bytes(body)) for name, (flags, body) in files.items()} == {
        "a/b/c.txt": (STORED, b"hello"),
        "a/b/d.txt": (STORED, b""),
    }
    for length in range(len(whole)):
        archive.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated" if length >= 8 else "no Qt resource archive"):
            ResourceArchive(archive).files()


@pytest.mark.parametrize("content", [b"", b"RIFF....WEBP", b"qres\0\0\0\4" + bytes(40)])
def test_a_file_that_is_no_archive_is_refused_with_what_came(tmp_path: Path, own_cache: Path, content: bytes) -> None:
    (gcompris(tmp_path) / "lang.rcc").write_bytes(content)
    with pytest.raises(ValueError, match="lang.rcc is no Qt resource archive: it begins with b'"):
        load_gcompris(tmp_path)


@pytest.mark.parametrize(
    "name", ["../../evil.webp", "..", ".", "", "/evil.webp", "..\\evil.webp", "c:evil.webp", "\0.webp"]
)
def test_no_name_in_an_archive_leads_out_of_its_folder(tmp_path: Path, own_cache: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a file"):
        load_gcompris(gcompris(tmp_path, lang={"cat.webp": webp(), name: webp()}))
    assert not list(own_cache.rglob("*"))


@pytest.mark.parametrize(("count", "first"), [(1, 0), (1, 1), (2, 1), (2**32 - 1, 1), (1, 2**32 - 1)])
def test_a_tree_that_bites_its_tail_ends(tmp_path: Path, count: int, first: int) -> None:
    whole = bytearray(rcc_bytes("a/b", {"c.txt": b"hello"}))
    tree = struct.unpack_from(">I", whole, 8)[0]
    struct.pack_into(">II", whole, tree + 22 * 2 + 6, count, first)  # the children of b
    (tmp_path / "a.rcc").write_bytes(whole)
    with pytest.raises(ValueError, match="truncated or broken"):
        ResourceArchive(tmp_path / "a.rcc").files()


@given(st.data())
def test_damaged_archives_are_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(rcc_bytes("a/b", {"c.txt": b"hello", "d.txt": b"world"}))
    for _ in range(3):
        whole[data.draw(st.integers(8, len(whole) - 1))] = data.draw(st.integers(0, 255))
    archive = tmp_path_factory.getbasetemp() / "damaged.rcc"
    archive.write_bytes(whole)
    try:
        names = list(ResourceArchive(archive).files())
    except ValueError as error:
        assert "truncated or broken" in str(error)
    else:
        assert all(".." not in name.split("/") for name in names)


def test_a_missing_activity_is_named(tmp_path: Path) -> None:
    (gcompris(tmp_path) / "instruments.rcc").unlink()
    with pytest.raises(FileNotFoundError, match="instruments.rcc is missing"):
        load_gcompris(tmp_path)


@pytest.mark.parametrize(
    ("stem", "name"),
    [("orange-color", "orange color"), ("polar_bear", "polar bear"), ("scarletMacaw", "scarlet macaw"), ("Cat", "cat")],
)
def test_the_words_of_a_file_name_are_parted(stem: str, name: str) -> None:
    assert spelled_out(stem) == name


@pytest.mark.network
def test_the_real_gcompris_has_its_rows() -> None:
    rows = load_gcompris()
    assert Counter(row["folder"] for row in rows) == {"lang": 116, "explore_world_animals": 10, "instruments": 26}
    assert sum(row["sound"] is not None for row in rows) == 35


# --- all ------------------------------------------------------------------------------------------------------------


def test_only_known_datasets_are_prepared() -> None:
    with pytest.raises(ValueError, match="tuxpaint"):
        prepare_all(["imagenet"])


@pytest.mark.network
@pytest.mark.parametrize(("name", "count"), [("tuxpaint", 934), ("openclipart", 4261), ("emoji", 1852)])
def test_the_real_datasets_have_the_rows_that_the_readme_counts(name: str, count: int) -> None:
    rows = DATASETS[name]()
    assert len(rows) == count and len({row["id"] for row in rows}) == count
