"""Media: a path, bytes, URL, array or open file becomes a picture, the frames of a video, or a sound.

Unusual: nothing here knows of items; what cannot be read is an `Unreadable` with a reason fit for the user. ffmpeg only
ever sees an opened file, so a playlist in disguise can open nothing else. Room: below items; needs no torch.
"""

import io
import math
import numbers
import os
import re
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile
import soxr
from PIL import Image, UnidentifiedImageError

MAX_URL_BYTES = 1 << 28
MAX_CHANNELS = 32  # above it, a two-dimensional array is rather a spectrogram
URL_TIMEOUT_SECONDS = 30
BLOCK_SAMPLES = 1 << 18

Given = Any  # what a caller may bring: checked here, not by types
VideoParts = tuple[tuple[Image.Image, ...], tuple[float, ...], np.ndarray | None]  # frames, seconds, sound

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.ASCII)  # two letters at least: C:\ is a disk
_CUT = (av.error.InvalidDataError, av.error.EOFError)  # what ffmpeg says of damaged packets and cut ends
_EXIF_ORIENTATION = 0x0112
_EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(ValueError):
    """A failure whose message is already fit for the user."""


@dataclass(frozen=True)
class LoadOptions:
    """How media are read.

    Attributes:
        sampling_rate: hz that every sound is resampled to.
        num_frames: frames sampled of a video.
        use_video_audio: take a video's own sound track where the item has no ``audio``.
        load_vision: False where the model cannot see: pictures are not decoded, an item of nothing else is an error.
        load_audio: the same for sound.
        allow_urls: fetch http(s) media.
        max_pixels: a bigger picture or frame is refused before it is decoded.
        max_audio_seconds: a longer sound is cut to its first ``max_audio_seconds``; the rest is never held in memory.
        max_frames: most pictures and frames in one item: ``image``, ``images`` and what is sampled of ``video``.
    """

    sampling_rate: int = 16_000
    num_frames: int = 8
    use_video_audio: bool = True
    load_vision: bool = True
    load_audio: bool = True
    allow_urls: bool = False
    max_pixels: int = 100_000_000
    max_audio_seconds: float = 600.0
    max_frames: int = 64

    def __post_init__(self) -> None:
        for name in ("sampling_rate", "num_frames", "max_pixels", "max_audio_seconds", "max_frames"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be above 0.")


# ---- where media come from ----


def _source(value: Given, options: LoadOptions) -> str | bytes:
    """The path of a file that exists, or the bytes, of a path, URL, bytes, open file or {"bytes", "path"}."""
    if isinstance(value, Mapping):
        if not set(value) <= {"bytes", "path"} or all(value[key] is None for key in value):
            raise Unreadable(f'a dict needs "bytes" or "path" and nothing else, got {sorted(map(str, value))}')
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _not_empty(bytes(value))
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        return _fetch(path, options) if isinstance(path, str) and _URL.match(path) else _existing(path)
    if hasattr(value, "read"):
        place = value.tell()
        data = value.read()
        value.seek(place)  # the caller's file is left as it came
        return _not_empty(data)
    raise Unreadable(f"cannot be read from a {type(value).__name__}; give a path, bytes, an open file or an array")


def _not_empty(data: bytes) -> bytes:
    if not data:
        raise Unreadable("holds zero bytes")
    return data


def _existing(path: str | bytes) -> str:
    path = os.fsdecode(path)
    if os.path.isdir(path):
        raise Unreadable(f"{_short(path)} is a directory; give a file")
    if not os.path.exists(path):
        raise Unreadable(f"no such file: {_short(path)}")
    if not os.path.isfile(path):
        raise Unreadable(f"{_short(path)} is not a regular file")
    if os.path.getsize(path) == 0:
        raise Unreadable(f"{_short(path)} holds zero bytes")
    return path


def _fetch(url: str, options: LoadOptions) -> bytes:
    if not options.allow_urls:
        raise Unreadable(f"URLs are refused unless allow_urls=True: {_short(url)}")
    if not url.lower().startswith(("http://", "https://")):
        raise Unreadable(f"only http and https URLs can be fetched: {_short(url)}")
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT_SECONDS) as answer:
            data = answer.read(MAX_URL_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise Unreadable(f"the server answers {error.code} ({error.reason}) for {_short(url)}") from error
    if len(data) > MAX_URL_BYTES:
        raise Unreadable(f"more than {MAX_URL_BYTES} bytes behind {_short(url)}; download it first")
    return _not_empty(data)


def _short(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:200]}... ({len(path)} characters)"


def _opened(source: str | bytes) -> BinaryIO:
    return open(source, "rb") if isinstance(source, str) else io.BytesIO(source)


def _is_array(value: Given) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "numpy")


def _array(value: Given) -> np.ndarray:
    """Any array; tensors by duck typing, so that this file needs no torch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


# ---- pictures ----


def load_picture(value: Given, options: LoadOptions) -> Image.Image:
    """One RGB picture: upright by its EXIF orientation, on white where transparent, the first frame if animated.

    Arrays: uint8, uint16 or float in [0, 1]; (H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4; channels last wins.
    """
    if isinstance(value, Image.Image):
        return _rgb(value, options)
    if _is_array(value):
        return _rgb(_array_picture(_array(value)), options)
    with _opened(_source(value, options)) as file:
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:
            raise Unreadable("is not a picture that PIL can read") from error
        if image.format == "EPS":
            raise Unreadable("EPS is refused: PIL would run Ghostscript on it; convert it to PNG")
        return _rgb(image, options)


def _rgb(image: Image.Image, options: LoadOptions) -> Image.Image:
    """Check the size, decode, turn upright, flatten on white. A new picture: the one that came stays as it is."""
    _check_pixels(*image.size, options)
    try:
        image.load()
    except OSError as error:
        raise Unreadable(f"the picture is truncated or damaged ({error})") from error
    if getattr(image, "_ended", False):  # a JPEG that PIL completed because somebody set LOAD_TRUNCATED_IMAGES
        raise Unreadable("the picture is truncated")
    turn = _EXIF_TURNS.get(_orientation(image) or 1)
    if image.mode.startswith("I"):  # 16 bits, which PIL's convert would clip; 32 bits hold 16 or 8
        deep = np.asarray(image).clip(0, 65_535)
        image = _array_picture(deep.astype(np.uint16 if image.mode != "I" or deep.max() > 255 else np.uint8))
    elif image.has_transparency_data:
        above = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(above)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):  # damaged EXIF, sound pixels
        return None


def _check_pixels(width: int, height: int, options: LoadOptions) -> None:
    if not width * height:
        raise Unreadable(f"{width} x {height} pixels: there is no picture")
    if width * height > options.max_pixels:
        limit = f"max_pixels={options.max_pixels}"
        raise Unreadable(
            f"{width} x {height} pixels are more than {limit}: refused as a decompression bomb, not decoded"
        )


def _array_picture(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # (H, W, C)
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise Unreadable(f"a picture's array is (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4; got {array.shape}")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise Unreadable("the picture holds NaN or infinite values")
        if array.min() < -1e-3 or array.max() > 1 + 1e-3:
            raise Unreadable(
                f"a float picture lies in [0, 1], got [{array.min():g}, {array.max():g}]; divide it by 255"
            )
        array = np.rint(array.clip(0, 1) * 255)
    elif array.dtype == np.uint16:
        array = array // 257
    elif array.dtype != np.uint8:
        raise Unreadable(f"a picture's array is uint8, uint16 or float, got {array.dtype}")
    array = array.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))


# ---- videos ----


def load_video(value: Given, options: LoadOptions, own_sound: bool) -> VideoParts:
    """Frames, their seconds, and the video's own sound or None.

    A list of pictures or a (T, H, W, C) array is a silent video one second a frame; animated WebP, GIF and PNG are
    read by PIL, everything else by PyAV.
    """
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 4:
        picked = _centres(len(value), options.num_frames) if options.load_vision else []
        return tuple(load_picture(value[place], options) for place in picked), tuple(map(float, picked)), None
    if not (options.load_vision or own_sound):
        return (), (), None
    source = _source(value, options)
    frames: dict[float, Image.Image] = {}
    if _is_animation(source):
        frames = _animation_frames(source, options) if options.load_vision else {}
        return tuple(frames.values()), tuple(frames), None
    if options.load_vision:
        frames = _seek_frames(source, options)
        if len(frames) < options.num_frames:  # a short video, no duration, or seeking that does not land
            frames = _stream_frames(source, options)
        if not frames:
            raise Unreadable("no frame of the video could be decoded; it is truncated or damaged")
    return tuple(frames.values()), tuple(frames), _track(source, options) if own_sound else None


def _centres(total: int, count: int) -> list[int]:
    """The middles of ``count`` equal parts of ``range(total)``; all of it where it has no more than ``count``."""
    return list(range(total)) if total <= count else [(2 * part + 1) * total // (2 * count) for part in range(count)]


def _is_animation(source: str | bytes) -> bool:
    with _opened(source) as file:
        head = file.read(12)
    return head.startswith((b"GIF8", b"\x89PNG")) or head[8:] == b"WEBP"


def _animation_frames(source: str | bytes, options: LoadOptions) -> dict[float, Image.Image]:
    frames, now = {}, 0.0
    with _opened(source) as file, Image.open(file) as image:
        _check_pixels(*image.size, options)
        total = getattr(image, "n_frames", 1)
        wanted = set(_centres(total, options.num_frames))
        for place in range(max(wanted) + 1):
            image.seek(place)
            if place in wanted:
                frame = _rgb(image, options)
                frames[image.info.get("timestamp", now * 1000) / 1000] = frame  # WebP tells the time once it is decoded
            now += max(image.info.get("duration", 0), 1) / 1000  # at least 1 ms, so that no two frames share a time
    return frames


@contextmanager
def _container(source: str | bytes) -> Iterator[av.container.InputContainer]:
    # Opened by us, with every protocol closed to ffmpeg: a playlist in disguise could otherwise open files and URLs.
    with _opened(source) as file:
        try:
            container: Any = av.open(file, options={"protocol_whitelist": "none"}, metadata_errors="ignore")
        except _CUT as error:
            raise Unreadable(
                f"is no sound or video that ffmpeg can read, or is cut short ({error.strerror})"
            ) from error
        with container:
            yield container


@contextmanager
def _video_stream(
    source: str | bytes, options: LoadOptions
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    with _container(source) as container:
        stream: Any = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # a song's cover is no video
            raise Unreadable("there is no video stream in it; give a sound as audio")
        if stream.width * stream.height:  # a truncated file may not know its size: then no frame will come
            _check_pixels(stream.width, stream.height, options)
        yield container, stream


def _decoded(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[Any]:
    """Frames in order. Damaged packets are passed over and a cut end ends it, as in a player."""
    for packet in _packets(container, stream):
        try:
            frames = packet.decode()
        except _CUT:
            continue
        yield from frames


def _seek_frames(source: str | bytes, options: LoadOptions) -> dict[float, Image.Image]:
    """{seconds: frame on screen at the centre of an equal part of the duration}; too few where seeking fails."""
    frames: dict[float, Image.Image] = {}
    with _video_stream(source, options) as (container, stream):
        tick = _tick(stream)
        length = stream.duration * tick if stream.duration else (container.duration or 0) / av.time_base
        start = (stream.start_time or 0) * tick
        for part in range(options.num_frames if length > 0 else 0):
            target = round((start + length * (2 * part + 1) / (2 * options.num_frames)) / tick)
            try:
                container.seek(target, stream=stream)
            except av.error.FFmpegError:
                break
            frame = _frame_at(container, stream, target)
            if frame is None or frame.pts is None:
                break
            seconds = float(frame.pts * tick - start)
            if seconds not in frames:
                frames[seconds] = _upright(frame)
    return frames


def _tick(stream: av.VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, av.time_base)


def _frame_at(container: av.container.InputContainer, stream: av.VideoStream, target: int) -> av.VideoFrame | None:
    """The last frame that begins by ``target`` (in the stream's ticks), or the first one after it."""
    held = None
    for frame in _decoded(container, stream):
        if frame.pts is None or (held is not None and frame.pts > target):
            break
        held = frame
    return held


def _stream_frames(source: str | bytes, options: LoadOptions) -> dict[float, Image.Image]:
    """Uniform over the frame count, without seeking: count the packets undecoded, then decode and keep the chosen."""
    with _video_stream(source, options) as (container, stream):
        total = sum(packet.size > 0 for packet in _packets(container, stream))
    wanted = set(_centres(total, options.num_frames))
    frames: dict[float, Image.Image] = {}
    with _video_stream(source, options) as (container, stream):
        start = float((stream.start_time or 0) * _tick(stream))
        rate = float(stream.average_rate or 1)
        for place, frame in enumerate(_decoded(container, stream)):
            if place in wanted:
                seconds = place / rate if frame.time is None else frame.time - start
                frames[seconds] = _upright(frame)
            if len(frames) == len(wanted):
                break
    return frames


def _packets(container: av.container.InputContainer, stream: av.stream.Stream) -> Iterator[av.Packet]:
    try:
        yield from container.demux(stream)
    except _CUT:
        return


def _upright(frame: av.VideoFrame) -> Image.Image:
    image = frame.to_image().convert("RGB")
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


# ---- sounds ----


def load_sound(value: Given, options: LoadOptions) -> np.ndarray:
    """(S,) float32 at the wanted rate, from a path, bytes, (array, hz) or {"array", "sampling_rate"}.

    Arrays: (S,), (S, C) or (C, S), the smaller side being the channels (a tie is (S, C)); channels are averaged,
    8, 16 and 32 bit integers are scaled to [-1, 1].
    """
    if isinstance(value, Mapping) and "array" in value:
        if "sampling_rate" not in value or not set(value) <= {"array", "sampling_rate", "path"}:
            raise Unreadable(f'a sound\'s dict is {{"array", "sampling_rate"}}, got {sorted(map(str, value))}')
        value = (value["array"], value["sampling_rate"])
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return _sound_of_array(value[0], value[1], options)
    if _is_array(value) or isinstance(value, (tuple, list)):
        raise Unreadable('an array alone does not tell its rate; give (array, hz) or {"array", "sampling_rate"}')
    source = _source(value, options)
    try:
        samples, rate = _read_soundfile(source, options.max_audio_seconds)
    except (soundfile.SoundFileError, TypeError):  # TypeError: a name that ends in .raw
        track = _read_track(source, options.max_audio_seconds)
        if track is None:
            raise Unreadable("there is no sound in it") from None
        samples, rate = track
    return _resampled(samples, rate, options)


def _sound_of_array(array: Given, rate: Given, options: LoadOptions) -> np.ndarray:
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 < float(rate) < math.inf:
        got = f"{rate!r}" if isinstance(rate, numbers.Number) else f"a {type(rate).__name__}"
        raise Unreadable(f"the sampling rate must be a number of hz above 0, got {got}; give (array, hz)")
    array = _array(array)
    if array.size == 0:
        raise Unreadable("the sound has zero length")
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T  # (S, C)
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] > MAX_CHANNELS):
        raise Unreadable(
            f"a sound's array is (S,), (S, C) or (C, S), at most {MAX_CHANNELS} channels; got {array.shape}"
        )
    samples = _scaled(array[: math.ceil(options.max_audio_seconds * float(rate))])
    return _resampled(samples if samples.ndim == 1 else samples.mean(axis=1), float(rate), options)


def _scaled(array: np.ndarray) -> np.ndarray:
    """To float32, integers by their full scale."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "f":
        return array.astype(np.float32)
    if kind not in "iu" or size > 4:
        raise Unreadable(f"samples are floats or integers of 8 to 32 bits, got {array.dtype}")
    half = 2.0 ** (8 * size - 1)
    return ((array.astype(np.float64) - (half if kind == "u" else 0)) / half).astype(np.float32)


def _resampled(samples: np.ndarray, rate: float, options: LoadOptions) -> np.ndarray:
    if not samples.size:
        raise Unreadable("the sound has zero length")
    if not np.isfinite(samples).all():
        raise Unreadable("the sound holds NaN or infinite samples")
    if rate != options.sampling_rate:
        samples = soxr.resample(samples, rate, options.sampling_rate, quality="HQ")
    if not samples.size:
        raise Unreadable(f"the sound is shorter than one sample at {options.sampling_rate} hz")
    return np.array(samples, dtype=np.float32)  # a copy: never the caller's own memory


def _read_soundfile(source: str | bytes, seconds: float) -> tuple[np.ndarray, float]:
    """Mono samples and hz; block by block, because a header may promise any length."""
    blocks = [np.zeros(0, np.float32)]
    with soundfile.SoundFile(source if isinstance(source, str) else io.BytesIO(source)) as file:
        left = math.ceil(seconds * file.samplerate)
        while left > 0:
            block = file.read(min(left, BLOCK_SAMPLES), dtype="float32", always_2d=True)
            if not len(block):
                break
            blocks.append(block.mean(axis=1))
            left -= len(block)
        return np.concatenate(blocks), file.samplerate


def _read_track(source: str | bytes, seconds: float) -> tuple[np.ndarray, float] | None:
    """Mono samples and hz of the first sound track by PyAV; None where there is no track or nothing on it."""
    blocks, rate, left = [], 0, math.inf
    with _container(source) as container:
        stream = container.streams.best("audio")
        for frame in _decoded(container, stream) if stream is not None else ():
            array = _scaled(frame.to_ndarray())  # (C, S), or (1, S * C) where channels alternate
            if not frame.format.is_planar:
                array = array.reshape(-1, frame.layout.nb_channels).T  # (C, S)
            rate = rate or frame.sample_rate
            left = min(left, math.ceil(seconds * rate))
            blocks.append(array[:, : int(left)].mean(axis=0))
            left -= array.shape[1]
            if left <= 0:
                break
    return (np.concatenate(blocks), rate) if blocks else None


def _track(source: str | bytes, options: LoadOptions) -> np.ndarray | None:
    try:
        track = _read_track(source, options.max_audio_seconds)
        return None if track is None else _resampled(*track, options)
    except Unreadable as error:
        raise Unreadable(f"its sound track: {error}; use_video_audio=False leaves it out") from error
