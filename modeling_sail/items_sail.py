"""Items: the fields an item may have, how its text is cleaned and its media are read, and which item is bad and why.

Unusual: a decoder's exception never escapes raw. Every failure names the item, its field and the reason, and bad items
never change their neighbours. Room: first in the house; knows no model. How media are read is in media_sail.
"""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from .media_sail import Given, LoadOptions, Unreadable, VideoParts, load_picture, load_sound, load_video

FORMAT_ORDER = ("text", "title", "ocr", "asr", "nickname", "tags")  # in the prompt
IMPORTANCE_ORDER = ("text", "title", "tags", "nickname", "ocr", "asr")  # truncation eats from the last
MEDIA_FIELDS = ("image", "images", "video", "audio")
KNOWN_FIELDS = ("id", *FORMAT_ORDER, *MEDIA_FIELDS)

IMAGE_LENGTH, VIDEO_LENGTH, AUDIO_LENGTH = 500, 4000, 1000  # characters of text that cost about as much
MAX_LISTED_ERRORS = 100

_JOINERS = "\u200c\u200d"  # scripts and emoji need them between characters; at the ends they say nothing
_VISIBLE_FORMATS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"


class ItemError(ValueError):
    """One item that cannot be used: ``index`` in the caller's list, ``item_id``, ``field`` and ``reason``."""

    def __init__(self, index: int, item_id: str | None, field: str, reason: str) -> None:
        super().__init__(index, item_id, field, reason)  # all arguments, so that it survives a worker process
        self.index, self.item_id, self.field, self.reason = index, item_id, field, reason

    def __str__(self) -> str:
        name = f"item {self.index}" + ("" if self.item_id is None else f" (id {self.item_id!r})")
        return f"{name}, field {self.field!r}: {self.reason}"


class ItemsError(ValueError):
    """All bad items of a batch, in ``errors``; the message lists them (beyond 100 it says how many more)."""

    def __init__(self, errors: Sequence[ItemError]) -> None:
        super().__init__(list(errors))
        self.errors = list(errors)

    def __str__(self) -> str:
        lines = [f"  {error}" for error in self.errors[:MAX_LISTED_ERRORS]]
        more = len(self.errors) - len(lines)
        head = f'{len(self.errors)} bad item(s); mend or remove them, or pass errors="skip" to go on without them:'
        return "\n".join([head, *lines, *([f"  ... and {more} more"] if more else [])])


@dataclass(frozen=True)
class ItemStatus:
    """What became of one item: ``status`` is "ok", or "error" with the field and the reason."""

    index: int
    id: str | None
    status: str
    field: str = ""
    reason: str = ""


_DEFAULTS = LoadOptions()


@dataclass(frozen=True, eq=False)
class LoadedItem:
    """An item in memory.

    Attributes:
        index: position in the caller's list.
        id: the item's id as a string, or None.
        texts: field to cleaned, deduplicated text, in ``FORMAT_ORDER``; no empty ones.
        images: RGB pictures, ``image`` before ``images``.
        frames: RGB frames of the video, in time order, at most ``num_frames``.
        frame_times: seconds of each frame; frames given as a list count as one second apart.
        audio: (S,) float32, mono, at ``LoadOptions.sampling_rate``; None without sound.
    """

    index: int
    id: str | None
    texts: dict[str, str]
    images: tuple[Image.Image, ...] = ()
    frames: tuple[Image.Image, ...] = ()
    frame_times: tuple[float, ...] = ()
    audio: np.ndarray | None = None


# ---- items ----


def load_items(
    items: Iterable[Given],
    options: LoadOptions = _DEFAULTS,
    errors: str = "raise",
    check: Callable[[LoadedItem], None] | None = None,
) -> tuple[list[LoadedItem], list[ItemStatus]]:
    """Check, clean and decode a batch.

    Args:
        items: dicts with any of ``KNOWN_FIELDS``; a bare string is a ``text``, a PIL image an ``image``.
        options: how media are read.
        errors: "raise" checks every item, then lists all bad ones in one error; "skip" leaves the bad ones out.
        check: of a decoded item; it raises `ItemError` where the item is not to be taken.

    Returns:
        The good items, in order (``index`` tells their place), and one status for every item that came.

    Raises:
        ItemsError: bad items, with errors="raise". ValueError: an unknown ``errors``.
        TypeError: one item in place of a list.
    """
    if errors not in ("raise", "skip"):
        raise ValueError(f'errors={errors!r} is unknown; use "raise" or "skip".')
    if isinstance(items, (str, bytes, Mapping, Image.Image, os.PathLike)) or not isinstance(items, Iterable):
        raise TypeError(f"A list of items is needed, got one {type(items).__name__}; wrap it: [item].")
    loaded, statuses, bad = [], [], []
    for index, item in enumerate(items):
        try:
            found = load_item(item, options, index)
            if check is not None:
                check(found)
            loaded.append(found)
            statuses.append(ItemStatus(index, found.id, "ok"))
        except ItemError as error:
            bad.append(error)
            statuses.append(ItemStatus(index, error.item_id, "error", error.field, error.reason))
    if bad and errors == "raise":
        raise ItemsError(bad)
    return loaded, statuses


def load_item(item: Given, options: LoadOptions = _DEFAULTS, index: int = 0) -> LoadedItem:
    """Check, clean and decode one item; the item itself is never changed.

    Raises:
        ItemError: with ``index``, the item's id, the field and the reason.
    """
    item_id, fields = _fields_of(item, index)
    blame = partial(_blame, index, item_id)
    texts = _texts(fields, blame)
    images = _images(fields, options, blame) if options.load_vision else ()
    media: VideoParts = ((), (), None)
    if "video" in fields:
        with blame("video"):
            own_sound = options.load_audio and options.use_video_audio and "audio" not in fields
            media = load_video(fields["video"], options, own_sound)
    frames, times, audio = media
    if len(images) + len(frames) > options.max_frames:
        found = f"{len(images)} pictures and {len(frames)} frames, more than max_frames={options.max_frames}"
        raise ItemError(index, item_id, "video", found)
    if "audio" in fields and options.load_audio:
        with blame("audio"):
            audio = load_sound(fields["audio"], options)
    if not (texts or images or frames or audio is not None):
        raise ItemError(index, item_id, ", ".join(fields) or "item", _why_nothing(fields, options))
    return LoadedItem(index, item_id, texts, images, frames, times, audio)


def item_length(item: Given) -> int:
    """A cheap estimate of an item's cost, to sort by without decoding; never raises, bad items may count 0.

    Characters of text; a picture (or a frame of a list) counts 500, a video 4000 (8 frames), a sound 1000.
    """
    if isinstance(item, str):
        return len(item)
    if not isinstance(item, Mapping):
        return IMAGE_LENGTH * isinstance(item, Image.Image)
    fields = {name: value for name, value in item.items() if not _is_absent(value)}
    text = sum(len(line) for name in FORMAT_ORDER for line in _as_list(fields.get(name)) if isinstance(line, str))
    pictures = len(_as_list(fields.get("image"))) + len(_as_list(fields.get("images")))
    video = fields.get("video")
    frames = len(video) * IMAGE_LENGTH if isinstance(video, (list, tuple)) else VIDEO_LENGTH * (video is not None)
    return text + pictures * IMAGE_LENGTH + min(frames, VIDEO_LENGTH) + AUDIO_LENGTH * ("audio" in fields)


@contextmanager
def _blame(index: int, item_id: str | None, field: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes an ItemError of this field, except running out of memory."""
    try:
        yield
    except (ItemError, MemoryError):
        raise
    except Unreadable as error:
        raise ItemError(index, item_id, field, str(error)) from error
    except Exception as error:
        raise ItemError(index, item_id, field, f"cannot be read ({type(error).__name__}: {error})") from error


def _fields_of(item: Given, index: int) -> tuple[str | None, dict[str, Given]]:
    """The item's id and its fields that are not absent; absent are None, empty strings and empty lists."""
    if isinstance(item, str):
        item = {"text": item}
    if isinstance(item, Image.Image):
        item = {"image": item}
    if not isinstance(item, Mapping):
        hint = ', as {"image": path}, {"video": path} or {"audio": path}' if isinstance(item, os.PathLike) else ""
        kinds = "a dict, a string or a PIL image"
        raise ItemError(index, None, "item", f"a {type(item).__name__} is no item; give {kinds}{hint}")
    item_id = item.get("id")
    if item_id is not None and (isinstance(item_id, bool) or not isinstance(item_id, (str, int, np.integer))):
        raise ItemError(index, None, "id", f"an id is a string or an integer, got {type(item_id).__name__}")
    item_id = None if item_id is None else str(item_id)
    for name in item:
        if name not in KNOWN_FIELDS:
            raise ItemError(index, item_id, str(name), f"unknown field; known are {', '.join(KNOWN_FIELDS)}")
    return item_id, {name: item[name] for name in KNOWN_FIELDS[1:] if not _is_absent(item.get(name))}


def _images(fields: Mapping[str, Given], options: LoadOptions, blame: partial) -> tuple[Image.Image, ...]:
    pictures: list[Image.Image] = []
    for name in ("image", "images"):
        given = [fields[name]] if name == "image" and name in fields else _as_list(fields.get(name))
        with blame(name):
            if len(pictures) + len(given) > options.max_frames:  # before any of them is decoded
                raise Unreadable(f"{len(pictures) + len(given)} pictures, more than max_frames={options.max_frames}")
            for number, value in enumerate(given, 1):
                try:
                    pictures.append(load_picture(value, options))
                except Unreadable as error:
                    place = f"picture {number} of {len(given)}: " if len(given) > 1 else ""
                    raise Unreadable(f"{place}{error}") from error
    return tuple(pictures)


def _is_absent(value: Given) -> bool:
    return value is None or (isinstance(value, (str, list, tuple)) and len(value) == 0)


def _as_list(value: Given) -> list[Given]:
    """Lists, tuples and stacks of pictures (N, ...) as they are, nothing as [], anything else as a list of one."""
    if value is None or isinstance(value, (list, tuple)):
        return list(value or ())
    return list(value) if getattr(value, "ndim", 0) == 4 else [value]


def _why_nothing(fields: Mapping[str, Given], options: LoadOptions) -> str:
    if not fields:
        return f"the item is empty; give at least one of {', '.join(KNOWN_FIELDS[1:])}"
    blind = [] if options.load_vision else ["vision"]
    deaf = [] if options.load_audio else ["audio"]
    if (blind or deaf) and any(name in MEDIA_FIELDS for name in fields):
        return f"nothing is left: the model has no {' and no '.join(blind + deaf)} tower; add text or another medium"
    return "nothing is left after cleaning and loading; give text that can be seen, or a medium with content"


# ---- text ----


def clean_text(value: str) -> str:
    """One line of clean text: Unicode NFC, single spaces, no control characters.

    Control characters, lone surrogates and invisible format characters go; zero-width joiners stay between characters,
    where scripts and emoji need them, and the few visible format characters (Arabic number signs) stay.

    Raises:
        ValueError: not a string.
    """
    if not isinstance(value, str):
        raise Unreadable(f"text must be a string, got {type(value).__name__}")
    if not value.isprintable():
        value = "".join(letter for letter in value if letter.isprintable() or _stays(letter))
    return " ".join(unicodedata.normalize("NFC", value).split()).strip(" " + _JOINERS)


def render_texts(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    r"""The documented format of an item's text, one segment a field; their concatenation is the whole text.

    ``FORMAT_ORDER``, absent and empty fields left out, "\n" between fields (it opens the later segment). ``text``
    stands bare, the others after their name: ``"a bare text\ntitle: Tea\nocr: Hot!\ntags: tea, hot"``.
    """
    segments: list[tuple[str, str]] = []
    for name in FORMAT_ORDER:
        if texts.get(name):
            label = "" if name == "text" else f"{name}: "
            segments.append((name, ("\n" if segments else "") + label + texts[name]))
    return segments


def _stays(letter: str) -> bool:
    category = unicodedata.category(letter)
    return letter.isspace() or letter in _JOINERS or letter in _VISIBLE_FORMATS or category not in ("Cc", "Cf", "Cs")


def clean_texts(fields: Mapping[str, Given]) -> dict[str, str]:
    """The text fields of an item as the model reads them: field to text, in ``FORMAT_ORDER``, each thing said once.

    Raises:
        ItemError: a field holds something else; says which.
    """
    return _texts(fields, partial(_blame, 0, None))


def _texts(fields: Mapping[str, Given], blame: partial) -> dict[str, str]:
    """Cleaned texts, each thing said once.

    The unit is a line, or a member of a list of tags. In ``FORMAT_ORDER``, a unit that an earlier unit or an earlier
    whole field already said (case, space and punctuation aside) is dropped, and so is a field which as a whole repeats
    an earlier one. The units that remain are joined by a space, tags of a list by ", ".
    """
    said: set[str] = set()
    texts = {}
    for name in FORMAT_ORDER:
        with blame(name):
            units = _units(name, fields.get(name))
        fresh: dict[str, str] = {}
        for unit in filter(None, units):
            if (key := _key(unit)) not in said:
                fresh.setdefault(key, unit)
        whole = _key(" ".join(units))
        if fresh and whole not in said:
            texts[name] = (", " if isinstance(fields[name], (list, tuple)) else " ").join(fresh.values())
        said.update((whole, *fresh))
    return texts


def _units(name: str, value: Given) -> list[str]:
    if isinstance(value, (list, tuple)) and name == "tags":
        return [clean_text(tag) for tag in value]
    if value is not None and not isinstance(value, str):
        more = " or a list of strings" if name == "tags" else ""
        raise Unreadable(f"must be a string{more}, got {type(value).__name__}; leave the field out where there is none")
    return [clean_text(line) for line in (value or "").splitlines()]


def _key(text: str) -> str:
    """What two texts must share to count as the same; of a text that is all punctuation, everything."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return folded.translate(_LETTERS) or folded


class _Letters(dict[int, int | None]):
    """What `str.translate` makes of each character: None of punctuation and space. Filled as characters come."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PZ" else code
        return self[code]


_LETTERS = _Letters()
