"""What an item may be, what comes out of it, and how a bad one is reported; every medium is synthesized here."""

import functools
import http.server
import io
import pickle
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from modeling_sail import items_sail, media_sail
from modeling_sail.items_sail import (
    FORMAT_ORDER,
    IMPORTANCE_ORDER,
    ItemError,
    ItemsError,
    LoadedItem,
    LoadOptions,
    clean_text,
    item_length,
    load_item,
    load_items,
    render_texts,
)

HZ = 16_000
RED = (255, 0, 0)


def picture(color: tuple[int, ...] = RED, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, color)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tone(seconds: float = 1.0, hz: int = HZ, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * hz)) / hz)).astype(np.float32)


def sound_bytes(samples: np.ndarray, hz: int, kind: str = "WAV", **options: object) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, hz, format=kind, **options)
    return buffer.getvalue()


def video_bytes(
    grays: list[int],
    fps: int = 8,
    kind: str = "mp4",
    codec: str = "mpeg4",
    sound: np.ndarray | None = None,
    gop: int = 12,
) -> bytes:
    """A video whose frames are plain gray, so that a frame tells which one it is; ``sound`` is (S,) at 16 kHz."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(gop)})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 8_000_000
        track = None if sound is None else container.add_stream("aac", rate=HZ, layout="mono")
        for gray in grays:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), gray, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = HZ, 0
            container.mux(track.encode(frame))
            container.mux(track.encode(None))
    return buffer.getvalue()


def sound_only_mp4(seconds: float = 1.0) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=HZ, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(seconds)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = HZ, 0
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return buffer.getvalue()


def grays_of(item: LoadedItem) -> list[int]:
    return [int(np.asarray(frame).mean().round()) for frame in item.frames]


def pixel(image: Image.Image, place: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel(place)


def reason_of(item: object, field: str, options: LoadOptions | None = None) -> str:
    """The item's error, after checking that it tells item, id and field, and that nothing else can escape."""
    with pytest.raises(ItemError) as caught:
        load_item(item, options or LoadOptions(), index=7)
    error = caught.value
    expected_id = str(item["id"]) if isinstance(item, dict) and "id" in item else None
    assert (error.index, error.item_id, error.field) == (7, expected_id, field)
    assert "item 7" in str(error) and repr(field) in str(error) and error.reason in str(error)
    assert expected_id is None or repr(expected_id) in str(error)
    assert " at 0x" not in error.reason, "an address in a message is no reason"
    return error.reason


@functools.cache
def long_video() -> bytes:
    return video_bytes([round(240 * place / 159) for place in range(160)], fps=8)


# ---- items and text ----


def test_a_bare_string_is_a_text_and_a_pil_image_an_image() -> None:
    assert load_item("tea").texts == {"text": "tea"}
    assert pixel(load_item(picture()).images[0]) == RED


def test_none_empty_strings_and_empty_lists_are_absent_fields() -> None:
    item = {"id": 3, "title": "tea", "ocr": "", "tags": [], "images": [], "image": None, "audio": None, "video": []}
    loaded = load_item(item)
    assert (loaded.id, loaded.texts, loaded.images, loaded.frames, loaded.audio) == (
        "3",
        {"title": "tea"},
        (),
        (),
        None,
    )


@given(st.text(st.characters(codec=None)))
@settings(max_examples=500)
def test_clean_text_is_idempotent_nfc_one_line_and_free_of_control_characters(text: str) -> None:
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, cleaned))
    assert cleaned == cleaned.strip() and "  " not in cleaned
    cleaned.encode("utf-8")


@given(st.text("ab \t\n\r\u00a0\u3000\u200b\u200d\u200c\ufeff\u0301e\x00\x1f\x85\u2028\ud800\u2000<\u0338"))
@settings(max_examples=500)
def test_clean_text_keeps_its_promises_on_the_characters_that_break_them(text: str) -> None:
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned and unicodedata.is_normalized("NFC", cleaned)
    assert not set("\t\n\r\u00a0\u3000\u200b\ufeff\x00\x1f\x85\u2028\ud800") & set(cleaned)
    assert cleaned == cleaned.strip(" \u200c\u200d") and "  " not in cleaned


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\tb\n c ", "a b c"),
        ("e\u0301", "\u00e9"),
        ("a\x00b\u200bc\ufeff\u00ad", "abc"),
        ("\ud800x", "x"),
        ("\U0001f469\u200d\U0001f52c", "\U0001f469\u200d\U0001f52c"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
        ("\u200d\u200b \u200c", ""),
        ("\u8336\u3000\u8336", "\u8336 \u8336"),
    ],
)
def test_clean_text_by_example(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


def test_clean_text_refuses_what_is_no_string() -> None:
    with pytest.raises(ValueError, match="must be a string, got int"):
        clean_text(3)


@pytest.mark.parametrize(
    ("item", "texts"),
    [
        ({"title": "Hot Tea!", "ocr": "hot  tea"}, {"title": "Hot Tea!"}),
        ({"title": "Hot tea", "ocr": "HOT TEA\nhalf price"}, {"title": "Hot tea", "ocr": "half price"}),
        ({"asr": "la la\nla la\nend"}, {"asr": "la la end"}),
        ({"tags": ["tea", "Tea", " ", "hot"]}, {"tags": "tea, hot"}),
        ({"title": "tea", "tags": ("tea",)}, {"title": "tea"}),
        ({"tags": "tea, hot"}, {"tags": "tea, hot"}),
        ({"title": "a\nb", "ocr": "A B"}, {"title": "a b"}),
        ({"text": "a", "title": "a\nb", "ocr": "a b"}, {"text": "a", "title": "b"}),
        ({"title": "!!!", "ocr": "???"}, {"title": "!!!", "ocr": "???"}),
        ({"title": "hot tea", "ocr": "hot tea for two"}, {"title": "hot tea", "ocr": "hot tea for two"}),
        ({"title": "\u0915\u093f", "ocr": "\u0915\u0940"}, {"title": "\u0915\u093f", "ocr": "\u0915\u0940"}),
    ],
)
def test_a_thing_is_said_once(item: dict, texts: dict[str, str]) -> None:
    assert load_item(item).texts == texts


def test_the_format_is_one_fixed_documented_one() -> None:
    texts = load_item({"tags": ["x", "y"], "nickname": "n", "asr": "s", "ocr": "o", "title": "t", "text": "b"}).texts
    assert tuple(texts) == FORMAT_ORDER and sorted(IMPORTANCE_ORDER) == sorted(FORMAT_ORDER)
    segments = render_texts(texts)
    assert [name for name, _ in segments] == list(FORMAT_ORDER)
    rendered = "".join(segment for _, segment in segments)
    assert rendered == "b\ntitle: t\nocr: o\nasr: s\nnickname: n\ntags: x, y"
    assert render_texts({"title": "t", "ocr": ""}) == [("title", "title: t")] and render_texts({}) == []


def test_a_field_cannot_forge_another_one() -> None:
    texts = load_item({"title": "tea\nocr: forged", "ocr": "real"}).texts
    assert "".join(part for _, part in render_texts(texts)) == "title: tea ocr: forged\nocr: real"


def test_the_callers_item_is_never_changed() -> None:
    samples, image = tone(0.1), picture((0, 0, 0, 0), mode="RGBA")
    item = {"title": " a\n a", "tags": ["x", "x"], "image": image, "audio": (samples, HZ)}
    loaded = load_item(item)
    loaded.audio[:] = 9
    assert item == {"title": " a\n a", "tags": ["x", "x"], "image": image, "audio": (samples, HZ)}
    assert np.array_equal(samples, tone(0.1)) and image.mode == "RGBA"
    same = picture()
    load_item(same).images[0].putpixel((0, 0), (0, 0, 0))
    assert pixel(same) == RED


def test_item_length_estimates_without_decoding() -> None:
    assert item_length("four") == 4 and item_length({"title": "ab", "tags": ["c", "d"]}) == 4
    assert item_length(picture()) == item_length({"image": "never opened"}) < item_length({"video": "never opened"})
    assert item_length({"images": ["a", "b"]}) == 2 * item_length({"image": "a"})
    assert item_length({"audio": np.zeros(3)}) > item_length({"audio": None}) == 0
    assert [item_length(bad) for bad in (None, 3, {"title": 5}, {}, b"")] == [0] * 5


# ---- pictures ----


@pytest.mark.parametrize("form", ["path", "str", "bytes", "file", "pil", "array", "hf_bytes", "hf_path", "bytearray"])
def test_a_picture_comes_in_every_form(form: str, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(data := encoded(picture()))
    value = {
        "path": path,
        "str": str(path),
        "bytes": data,
        "file": io.BytesIO(data),
        "pil": picture(),
        "array": np.asarray(picture()),
        "hf_bytes": {"bytes": data, "path": None},
        "hf_path": {"bytes": None, "path": str(path)},
        "bytearray": bytearray(data),
    }[form]
    for _ in range(2):  # an open file can be loaded again
        (image,) = load_item({"image": value}).images
        assert (image.size, pixel(image)) == ((8, 6), RED)


class TensorLike:
    """What a tensor looks like to code that does not know torch."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def detach(self) -> "TensorLike":
        return self

    def cpu(self) -> "TensorLike":
        return self

    def numpy(self) -> np.ndarray:
        return self.array


@pytest.mark.parametrize(
    "array",
    [
        np.full((6, 8, 3), 51, np.uint8),
        np.full((6, 8, 4), (51, 51, 51, 255), np.uint8),
        np.full((6, 8), 51, np.uint8),
        np.full((6, 8, 1), 51, np.uint8),
        np.full((3, 6, 8), 51, np.uint8),
        np.full((6, 8, 3), 0.2, np.float32),
        np.full((3, 6, 8), 0.2, np.float64),
        np.full((6, 8), 51 * 257, np.uint16),
        TensorLike(np.full((3, 6, 8), 0.2, np.float32)),
    ],
)
def test_an_array_picture_comes_in_every_layout(array: np.ndarray) -> None:
    (image,) = load_item({"image": array}).images
    assert (image.size, pixel(image)) == ((8, 6), (51, 51, 51))


def test_images_are_a_list_one_or_a_stack_and_image_comes_first() -> None:
    blue, stack = picture((0, 0, 255)), np.zeros((2, 6, 8, 3), np.uint8)
    assert [pixel(image) for image in load_item({"images": [picture(), blue]}).images] == [RED, (0, 0, 255)]
    assert [pixel(image) for image in load_item({"images": picture(), "image": blue}).images] == [(0, 0, 255), RED]
    assert len(load_item({"images": stack}).images) == 2


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (picture((255, 0, 0, 0), mode="RGBA"), (255, 255, 255)),
        (picture((0, 0, 0, 51), mode="RGBA"), (204, 204, 204)),
        (picture((0, 0), mode="LA"), (255, 255, 255)),
        (picture().quantize(4), RED),
        (picture((0, 255, 255, 0), mode="CMYK"), RED),
        (picture((51,), mode="L"), (51, 51, 51)),
        (Image.new("1", (8, 6), 1), (255, 255, 255)),
        (Image.fromarray(np.full((6, 8), 51 * 257, np.uint16)), (51, 51, 51)),
        (Image.fromarray(np.full((6, 8), 51 * 257, np.int32)), (51, 51, 51)),
        (Image.fromarray(np.full((6, 8), 51, np.int32)), (51, 51, 51)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb_on_white(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert pixel(load_item(image).images[0]) == expected


def test_transparent_palettes_and_sixteen_bit_files_keep_their_look() -> None:
    palette = Image.new("P", (8, 6), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert pixel(load_item({"image": encoded(palette, transparency=0)}).images[0]) == (255, 255, 255)
    deep = Image.fromarray(np.full((6, 8), 51 * 257, np.uint16))
    for kind in ("PNG", "TIFF"):
        assert pixel(load_item({"image": encoded(deep, kind)}).images[0]) == (51, 51, 51)


@pytest.mark.parametrize("number", range(1, 9))
def test_exif_orientation_is_applied_as_pil_does(number: int) -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = number
    data = encoded(Image.fromarray(pixels), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(load_item({"image": data}).images[0]), np.asarray(expected))


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00" + b"garbage that is no TIFF")
    assert load_item({"image": data}).images[0].size == (8, 6)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_given_as_an_image_is_its_first_frame(kind: str) -> None:
    data = encoded(picture(), kind, save_all=True, append_images=[picture((0, 0, 255))], duration=100)
    (image,) = load_item({"image": data}).images
    assert np.abs(np.subtract(pixel(image), RED)).max() < 8


# ---- sounds ----


@pytest.mark.parametrize("form", ["path", "bytes", "file", "pair", "list_pair", "hf", "hf_list", "hf_bytes", "tensor"])
def test_a_sound_comes_in_every_form(form: str, tmp_path: Path) -> None:
    samples = tone(0.25)
    path = tmp_path / "tone.wav"
    path.write_bytes(data := sound_bytes(samples, HZ, subtype="FLOAT"))
    value = {
        "path": path,
        "bytes": data,
        "file": io.BytesIO(data),
        "pair": (samples, HZ),
        "list_pair": [samples, float(HZ)],
        "hf": {"array": samples, "sampling_rate": HZ, "path": None},
        "hf_list": {"array": samples.tolist(), "sampling_rate": HZ},
        "hf_bytes": {"bytes": data, "path": "tone.wav"},
        "tensor": (TensorLike(samples), np.int64(HZ)),
    }[form]
    audio = load_item({"audio": value}).audio
    assert audio.dtype == np.float32 and np.array_equal(audio, samples)


@pytest.mark.parametrize("hz", [8_000, 22_050, 44_100, 48_000])
def test_any_rate_is_resampled_to_the_models(hz: int) -> None:
    audio = load_item({"audio": (tone(1.0, hz), hz)}).audio
    assert abs(len(audio) - HZ) <= 1
    assert np.abs(audio - tone(1.0)[: len(audio)])[200:-200].max() < 1e-2


@pytest.mark.parametrize("shape", ["SC", "CS"])
def test_channels_are_averaged_and_are_the_smaller_side(shape: str) -> None:
    stereo = np.stack([tone(0.1), np.zeros(1600, np.float32)], axis=1)
    audio = load_item({"audio": (stereo if shape == "SC" else stereo.T, HZ)}).audio
    assert np.allclose(audio, tone(0.1) / 2)
    assert np.allclose(load_item({"audio": sound_bytes(stereo, HZ, subtype="FLOAT")}).audio, audio)


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("int16", 16384, 0.5),
        ("int32", -(2**30), -0.5),
        ("uint8", 192, 0.5),
        ("float64", 0.5, 0.5),
        ("float16", 0.5, 0.5),
    ],
)
def test_integer_samples_are_scaled_by_their_full_scale(dtype: str, value: float, expected: float) -> None:
    assert np.allclose(load_item({"audio": (np.full(100, value, dtype), HZ)}).audio, expected)


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_compressed_sounds_are_read(kind: str) -> None:
    audio = load_item({"audio": sound_bytes(tone(1.0, 44_100), 44_100, kind)}).audio
    assert abs(len(audio) - HZ) < 0.2 * HZ and 0.3 < np.abs(audio).max() < 0.7


def test_the_sound_of_an_mp4_is_read_without_and_with_pictures() -> None:
    for data in (sound_only_mp4(), video_bytes([10] * 8, sound=tone(1.0))):
        audio = load_item({"audio": data}).audio
        assert abs(len(audio) - HZ) < 0.2 * HZ and 0.3 < np.abs(audio).max() < 0.7


def test_silence_is_a_sound() -> None:
    assert not load_item({"audio": (np.zeros(10, np.float32), HZ)}).audio.any()


def test_a_long_sound_is_cut_to_its_bound_in_every_form() -> None:
    options = LoadOptions(max_audio_seconds=0.5)
    samples = tone(2.0)
    video = video_bytes([10] * 16, sound=samples)
    for value in ((samples, HZ), sound_bytes(samples, HZ), video, sound_bytes(tone(2.0, 44_100), 44_100)):
        assert abs(len(load_item({"audio": value}, options).audio) - 8000) <= 1
    assert len(load_item({"video": video}, options).audio) == 8000


# ---- videos ----


@pytest.mark.parametrize(
    ("kind", "codec"), [("mp4", "mpeg4"), ("mp4", "libx264"), ("matroska", "mpeg4"), ("mpegts", "mpeg4")]
)
@pytest.mark.parametrize("gop", [1, 12, 1000])
def test_frames_are_the_centres_of_equal_parts(kind: str, codec: str, gop: int) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV has no {codec}")
    grays = [20 + 6 * place for place in range(32)]
    item = load_item({"video": video_bytes(grays, kind=kind, codec=codec, gop=gop)}, LoadOptions(num_frames=4))
    slack = 1 if kind == "mpegts" else 0  # its duration comes from time stamps and ends with the last frame's begin
    chosen = [(gray - 20) / 6 for gray in grays_of(item)]
    assert np.abs(np.subtract(chosen, [4, 12, 20, 28])).max() <= slack + 0.5
    assert np.abs(np.subtract(item.frame_times, [0.5, 1.5, 2.5, 3.5])).max() <= slack / 8 + 0.01
    assert item.audio is None and all(frame.mode == "RGB" and frame.size == (64, 48) for frame in item.frames)


def test_a_video_comes_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "gray.mp4"
    path.write_bytes(long_video())
    expected = grays_of(load_item({"video": long_video()}))
    assert len(expected) == 8 and expected == sorted(expected)
    for value in (path, str(path), io.BytesIO(long_video()), {"bytes": None, "path": str(path)}):
        assert grays_of(load_item({"video": value})) == expected


def test_a_video_with_few_frames_gives_each_of_them_once() -> None:
    for kind in ("mp4", "matroska", "avi"):
        item = load_item({"video": video_bytes([20, 120, 220], kind=kind)})
        assert np.abs(np.subtract(grays_of(item), [20, 120, 220])).max() < 4
        assert list(item.frame_times) == sorted(set(item.frame_times))


def test_only_the_chosen_frames_are_turned_into_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    made, decoded, upright, decode = [], [], media_sail._upright, media_sail._decoded
    monkeypatch.setattr(media_sail, "_upright", lambda frame: made.append(1) or upright(frame))

    def counting(*arguments: object) -> Iterator[object]:
        for frame in decode(*arguments):
            decoded.append(1)
            yield frame

    monkeypatch.setattr(media_sail, "_decoded", counting)
    assert len(load_item({"video": long_video()}, LoadOptions(num_frames=4)).frames) == 4
    assert len(made) == 4 and len(decoded) <= 4 * 14, "it sought instead of decoding all 160 frames"


def test_a_video_without_duration_falls_back_to_one_pass() -> None:
    grays = [20 + 6 * place for place in range(32)]
    item = load_item({"video": video_bytes(grays, kind="m4v")}, LoadOptions(num_frames=4))  # raw stream: no times
    assert np.abs(np.subtract(grays_of(item), [grays[place] for place in (4, 12, 20, 28)])).max() < 4


def test_a_sound_track_longer_than_the_pictures_costs_no_frames() -> None:
    item = load_item({"video": video_bytes([20 + 6 * place for place in range(16)], kind="matroska", sound=tone(20))})
    assert len(item.frames) == 8 and len(set(grays_of(item))) == 8


def test_a_video_gives_its_own_sound_unless_told_otherwise() -> None:
    video = video_bytes([10] * 8, sound=tone(1.0))
    item = load_item({"video": video})
    assert len(item.frames) == 8 and abs(len(item.audio) - HZ) < 0.2 * HZ
    assert load_item({"video": video}, LoadOptions(use_video_audio=False)).audio is None
    explicit = load_item({"video": video, "audio": (tone(0.1), HZ)}).audio
    assert np.array_equal(explicit, tone(0.1))


def test_a_list_of_frames_and_a_stack_are_silent_videos() -> None:
    stack = np.arange(0, 200, 10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 6, 8, 3), np.uint8)
    for value in (stack, list(stack), [Image.fromarray(frame) for frame in stack], tuple(stack)):
        item = load_item({"video": value}, LoadOptions(num_frames=4))
        assert grays_of(item) == [20, 70, 120, 170] and item.frame_times == (2, 7, 12, 17) and item.audio is None


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animated_picture_is_a_silent_video(kind: str) -> None:
    frames = [picture((20 * place,) * 3) for place in range(12)]
    exact = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **exact)
    item = load_item({"video": data}, LoadOptions(num_frames=4))
    assert grays_of(item) == [20, 80, 140, 200] and item.audio is None
    assert np.allclose(item.frame_times, [0.1, 0.4, 0.7, 1.0])


def test_a_rotated_video_stands_upright() -> None:
    data = video_bytes([0] * 4)
    identity = bytes.fromhex("00010000" + "00000000" * 3 + "00010000" + "00000000" * 3 + "40000000")
    clockwise = bytes.fromhex("00000000" + "00010000" + "00000000" + "ffff0000" + "00000000" * 4 + "40000000")
    assert data.count(identity) == 2  # the movie's, then the track's
    movie, track, rest = data.split(identity)
    item = load_item({"video": movie + identity + track + clockwise + rest})
    assert {frame.size for frame in item.frames} == {(48, 64)}


def test_a_cut_video_gives_the_frames_it_still_has() -> None:
    data = video_bytes([20 + 6 * place for place in range(32)], kind="matroska", gop=4)
    item = load_item({"video": data[: len(data) // 2]}, LoadOptions(num_frames=4))
    assert len(item.frames) == 4 and max(grays_of(item)) < 20 + 6 * 24


# ---- models without a tower ----


def test_a_medium_without_a_tower_is_not_decoded() -> None:
    item = {"id": "x", "title": "tea", "image": b"never decoded", "audio": b"never decoded"}
    loaded = load_item(item, LoadOptions(load_vision=False, load_audio=False))
    assert loaded.texts == {"title": "tea"} and loaded.images == () and loaded.audio is None
    video = {"video": video_bytes([10] * 4, sound=tone(0.5))}
    deaf, blind = load_item(video, LoadOptions(load_audio=False)), load_item(video, LoadOptions(load_vision=False))
    assert len(deaf.frames) == 4 and deaf.audio is None and blind.frames == () and blind.audio is not None


def test_an_item_left_with_nothing_says_so() -> None:
    blind, deaf = LoadOptions(load_vision=False), LoadOptions(load_audio=False)
    assert "no vision tower" in reason_of({"id": "x", "image": picture()}, "image", blind)
    assert "no audio tower" in reason_of({"id": "x", "audio": (tone(0.1), HZ)}, "audio", deaf)
    assert "no vision tower" in reason_of({"id": "x", "video": video_bytes([10] * 4)}, "video", blind)


# ---- errors ----

BAD_ITEMS = {
    "unknown key": ({"id": "a", "titel": "tea"}, "titel", "known are id, text, title"),
    "number": (3, "item", "a int is no item"),
    "none": (None, "item", "no item"),
    "path": (Path("a.png"), "item", '{"image": path}'),
    "empty": ({"id": "a"}, "item", "empty"),
    "empty string": ("", "item", "empty"),
    "blank": ({"id": "a", "title": " \u200b"}, "title", "nothing is left"),
    "bad id": ({"title": "x", "id": 1.5}, "id", "string or an integer"),
    "text number": ({"id": "a", "title": 3}, "title", "must be a string, got int"),
    "text list": ({"id": "a", "ocr": ["x"]}, "ocr", "must be a string, got list"),
    "tags number": ({"id": "a", "tags": ["x", 3]}, "tags", "must be a string, got int"),
    "tags dict": ({"id": "a", "tags": {"x": 1}}, "tags", "or a list of strings"),
    "missing file": ({"id": "a", "image": "/no/such.png"}, "image", "no such file: /no/such.png"),
    "missing sound": ({"id": "a", "audio": Path("/no/such.wav")}, "audio", "no such file: /no/such.wav"),
    "missing video": ({"id": "a", "video": "/no/such.mp4"}, "video", "no such file: /no/such.mp4"),
    "nul in path": ({"id": "a", "image": "a\0b"}, "image", "no such file"),
    "directory": ({"id": "a", "image": "/tmp"}, "image", "directory"),
    "device": ({"id": "a", "audio": "/dev/zero"}, "audio", "not a regular file"),
    "url": ({"id": "a", "image": "https://x.org/a.png"}, "image", "URLs are refused unless allow_urls=True"),
    "s3": ({"id": "a", "audio": "s3://x/a.wav"}, "audio", "URLs are refused unless allow_urls=True"),
    "data url": ({"id": "a", "image": "data:image/png;base64,AAAA"}, "image", "URLs are refused"),
    "url in dict": ({"id": "a", "video": {"bytes": None, "path": "http://x/a"}}, "video", "URLs are refused"),
    "empty bytes": ({"id": "a", "image": b""}, "image", "zero bytes"),
    "empty dict": ({"id": "a", "image": {"bytes": None, "path": None}}, "image", '"bytes" or "path"'),
    "strange dict": ({"id": "a", "image": {"url": "x"}}, "image", '"bytes" or "path"'),
    "strange object": ({"id": "a", "image": object()}, "image", "cannot be read from a object"),
    "no picture": ({"id": "a", "image": b"nonsense"}, "image", "not a picture"),
    "none in list": ({"id": "a", "images": [picture(), None]}, "images", "picture 2 of 2"),
    "nan picture": ({"id": "a", "image": np.full((4, 4), np.nan)}, "image", "NaN"),
    "float range": ({"id": "a", "image": np.full((4, 4), 255.0)}, "image", "[0, 1]"),
    "int picture": ({"id": "a", "image": np.zeros((4, 4), np.int64)}, "image", "got int64"),
    "flat picture": ({"id": "a", "image": np.zeros(4, np.uint8)}, "image", "got (4,)"),
    "two channels": ({"id": "a", "image": np.zeros((6, 5, 2), np.uint8)}, "image", "got (6, 5, 2)"),
    "no pixels": ({"id": "a", "image": np.zeros((0, 4, 3), np.uint8)}, "image", "got (0, 4, 3)"),
    "zero-length": ({"id": "a", "audio": (np.zeros(0, np.float32), HZ)}, "audio", "zero length"),
    "nan sound": ({"id": "a", "audio": (np.array([0, np.nan], np.float32), HZ)}, "audio", "NaN"),
    "infinite sound": ({"id": "a", "audio": (np.array([0, np.inf], np.float32), 44_100)}, "audio", "NaN or infinite"),
    "no rate": ({"id": "a", "audio": np.zeros(9)}, "audio", "(array, hz)"),
    "zero rate": ({"id": "a", "audio": (np.zeros(9), 0)}, "audio", "above 0, got 0"),
    "negative rate": ({"id": "a", "audio": {"array": np.zeros(9), "sampling_rate": -1}}, "audio", "above 0, got -1"),
    "nan rate": ({"id": "a", "audio": (np.zeros(9), float("nan"))}, "audio", "above 0, got nan"),
    "swapped": ({"id": "a", "audio": (HZ, np.zeros(9))}, "audio", "got a ndarray; give (array, hz)"),
    "missing rate": ({"id": "a", "audio": {"array": np.zeros(9)}}, "audio", "sampling_rate"),
    "bool sound": ({"id": "a", "audio": (np.zeros(9, bool), HZ)}, "audio", "got bool"),
    "complex sound": ({"id": "a", "audio": (np.zeros(9, complex), HZ)}, "audio", "got complex128"),
    "int64 sound": ({"id": "a", "audio": (np.zeros(9, np.int64), HZ)}, "audio", "got int64"),
    "spectrogram": ({"id": "a", "audio": (np.zeros((80, 300)), HZ)}, "audio", "32 channels"),
    "cube sound": ({"id": "a", "audio": (np.zeros((2, 3, 4)), HZ)}, "audio", "(2, 3, 4)"),
    "ragged sound": ({"id": "a", "audio": ([[0.0], [0.0, 1.0]], HZ)}, "audio", "ValueError"),
    "no sound": ({"id": "a", "audio": b"nonsense"}, "audio", "Invalid data"),
    "no video": ({"id": "a", "video": b"nonsense"}, "video", "Invalid data"),
    "bad frame": ({"id": "a", "video": [picture(), "/no/such.png"]}, "video", "no such file"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_a_bad_item_is_an_error_with_id_field_and_reason(name: str) -> None:
    item, field, reason = BAD_ITEMS[name]
    if name == "bad id":  # there is no id to tell
        with pytest.raises(ItemError, match=reason):
            load_item(item)
        return
    assert reason in reason_of(item, field)


def test_an_empty_wav_and_a_nan_wav_are_errors() -> None:
    assert "zero length" in reason_of({"id": "a", "audio": sound_bytes(np.zeros(0), HZ)}, "audio")
    nan = sound_bytes(np.array([0.0, np.nan]), HZ, subtype="FLOAT")
    assert "NaN" in reason_of({"id": "a", "audio": nan}, "audio")
    assert "no sound" in reason_of({"id": "a", "audio": video_bytes([9] * 4)}, "audio")


def test_a_truncated_jpeg_is_an_error_even_if_somebody_told_pil_to_tolerate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    assert len(load_item({"image": data}).images) == 1
    for tolerant in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
        assert "truncated" in reason_of({"id": "a", "image": data[: len(data) // 2]}, "image")
        assert "truncated" in reason_of({"id": "a", "image": Image.open(io.BytesIO(data[: len(data) // 2]))}, "image")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_other_truncated_pictures_are_errors_too(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    assert reason_of({"id": "a", "image": data[: len(data) // 2]}, "image")


def test_a_decompression_bomb_is_refused_undecoded() -> None:
    options = LoadOptions(max_pixels=40)
    for field, value in (
        ("image", encoded(picture())),
        ("image", picture()),
        ("images", [np.zeros((6, 8), np.uint8)]),
        ("video", encoded(picture(), "GIF")),
        ("video", video_bytes([9] * 4)),
    ):
        assert "decompression bomb" in reason_of({"id": "a", field: value}, field, options)
    bomb = encoded(Image.new("1", (20_000, 20_000)))  # 50 kB that would be 1.2 GB of RGB
    assert "decompression bomb" in reason_of({"id": "a", "image": bomb}, "image")


def test_eps_never_reaches_ghostscript() -> None:
    assert "EPS is refused" in reason_of({"id": "a", "image": encoded(picture(), "EPS")}, "image")


def test_too_many_pictures_are_refused() -> None:
    item = {"id": "a", "image": picture(), "images": [picture()] * 2}
    assert "max_frames=2" in reason_of(item, "images", LoadOptions(max_frames=2))


def test_a_video_without_pictures_or_frames_is_an_error() -> None:
    assert "no video stream" in reason_of({"id": "a", "video": sound_only_mp4()}, "video")
    assert "no video stream" in reason_of({"id": "a", "video": sound_bytes(tone(0.1), HZ)}, "video")
    data = video_bytes([20] * 32)
    for cut in (16, 100, len(data) // 2):
        assert reason_of({"id": "a", "video": data[:cut]}, "video")
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    blank = data[:start] + bytes(end - start) + data[end:]
    assert "no frame" in reason_of({"id": "a", "video": blank}, "video")


@given(st.binary(min_size=1, max_size=200), st.sampled_from(["image", "audio", "video"]), st.integers(0, 400))
@settings(max_examples=150)
def test_no_damage_lets_a_raw_exception_escape(noise: bytes, field: str, place: int) -> None:
    whole = {"image": encoded(picture()), "audio": sound_bytes(tone(0.1), HZ), "video": small_video()}[field]
    damaged = whole[:place] + noise + whole[place + len(noise) :]
    try:
        load_item({field: damaged})
    except ItemError as error:
        assert error.field == field


@functools.cache
def small_video() -> bytes:
    return video_bytes([50] * 4)


def test_running_out_of_memory_and_interrupts_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (MemoryError, KeyboardInterrupt):

        def fail(*_: object, kind: type[BaseException] = kind) -> None:
            raise kind

        monkeypatch.setattr(items_sail, "load_picture", fail)
        with pytest.raises(kind):
            load_items([picture()], errors="skip")


def test_errors_survive_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(ItemsError([ItemError(1, "a", "image", "why")])))
    assert (error.errors[0].index, error.errors[0].item_id, error.errors[0].reason) == (1, "a", "why")
    assert "why" in str(error)


# ---- batches ----


def test_raise_lists_every_bad_item_of_the_batch() -> None:
    items = [item for item, _, _ in BAD_ITEMS.values()]
    with pytest.raises(ItemsError) as caught:
        load_items(["good", *items, "good"])
    assert [error.index for error in caught.value.errors] == list(range(1, len(items) + 1))
    message = str(caught.value)
    assert all(f"item {index}" in message for index in range(1, len(items) + 1)) and 'errors="skip"' in message
    with pytest.raises(ItemsError, match=r"250 bad item\(s\).*(.|\n)*and 150 more"):
        load_items([{}] * 250)


GOOD_ITEMS = [
    "tea",
    {"id": "x", "title": "tea", "image": picture(), "audio": (tone(0.05, 8000), 8000)},
    {"id": 2, "video": [picture((place,) * 3) for place in range(3)]},
    picture(mode="L", color=(7,)),
]


def same(one: LoadedItem, other: LoadedItem) -> bool:
    pictures = zip(one.images + one.frames, other.images + other.frames, strict=True)
    audio = one.audio is other.audio is None or np.array_equal(one.audio, other.audio)
    rest = (one.id, one.texts, one.frame_times) == (other.id, other.texts, other.frame_times)
    return audio and rest and all(left.tobytes() == right.tobytes() for left, right in pictures)


@given(st.lists(st.one_of(st.sampled_from(range(4)), st.sampled_from(sorted(BAD_ITEMS))), max_size=8))
@settings(max_examples=60)
def test_skip_gives_the_good_items_as_a_run_without_the_bad_ones(choice: list[int | str]) -> None:
    items = [BAD_ITEMS[name][0] if isinstance(name, str) else GOOD_ITEMS[name] for name in choice]
    good = [place for place, name in enumerate(choice) if not isinstance(name, str)]
    loaded, statuses = load_items(items, errors="skip")
    alone, _ = load_items([items[place] for place in good])
    assert [item.index for item in loaded] == good and [status.index for status in statuses] == list(range(len(items)))
    assert all(same(one, other) for one, other in zip(loaded, alone, strict=True))
    for status, name in zip(statuses, choice, strict=True):
        if isinstance(name, str):
            assert (
                status.status == "error" and status.field == BAD_ITEMS[name][1] and BAD_ITEMS[name][2] in status.reason
            )
        else:
            assert (status.status, status.field, status.reason) == ("ok", "", "")


def test_an_empty_batch_is_empty() -> None:
    assert load_items([]) == ([], [])


@pytest.mark.parametrize("items", ["tea", {"title": "tea"}, picture(), Path("x"), b"x", 3, None])
def test_one_item_in_place_of_a_list_is_a_mistake_of_the_caller(items: object) -> None:
    with pytest.raises(TypeError, match=r"wrap it: \[item\]"):
        load_items(items)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="errors='ignore'"):
        load_items([], errors="ignore")
    with pytest.raises(ValueError, match="num_frames=0"):
        LoadOptions(num_frames=0)


# ---- URLs ----


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A local server of one red picture, and the list of paths that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404 if "missing" in self.path else 200)
            self.end_headers()
            self.wfile.write(encoded(picture()))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_urls_are_fetched_only_when_allowed(server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    url, asked = server
    assert "allow_urls=True" in reason_of({"id": "a", "image": f"{url}/a.png"}, "image") and not asked
    allowed = LoadOptions(allow_urls=True)
    assert pixel(load_item({"image": f"{url}/a.png"}, allowed).images[0]) == RED and asked == ["/a.png"]
    assert "404" in reason_of({"id": "a", "image": f"{url}/missing"}, "image", allowed)
    for other in ("ftp://x/a.png", "file:///etc/passwd", "data:image/png;base64,AA", "s3://x/a"):
        assert "only http and https" in reason_of({"id": "a", "image": other}, "image", allowed)
    monkeypatch.setattr(media_sail, "MAX_URL_BYTES", 10)
    assert "more than 10 bytes" in reason_of({"id": "a", "image": f"{url}/a.png"}, "image", allowed)


def test_a_playlist_in_disguise_opens_no_url_and_no_file(server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = server
    (tmp_path / "secret.ts").write_bytes(video_bytes([50] * 8, kind="mpegts"))
    for target in (f"{url}/a.ts", f"file:{tmp_path}/secret.ts", "secret.ts"):
        playlist = tmp_path / "list.m3u8"
        playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n")
        for value in (playlist, playlist.read_bytes()):
            assert reason_of({"id": "a", "video": value}, "video")
            assert reason_of({"id": "a", "audio": value}, "audio")
    assert not asked
