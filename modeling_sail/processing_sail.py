"""SailEmbeddingProcessor: items -> one batch of tensors (SAIL-Embedding, section 3.2.2, Fig. 5).

A sequence is [prompt | audio | vision | text | prompt end]; each segment is tokenised on its own, so an item's tokens
never depend on which other modalities it has. Unusual: media are flat lists with an owner each, and the number of
placeholders is fixed per modality, so that truncation can only ever take text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from .configuration_sail import AUDIO, PAD, PROMPT, TEXT, VISION
from .items_sail import IMPORTANCE_ORDER, ItemError, ItemStatus, LoadedItem, LoadOptions, load_items, render_texts

if TYPE_CHECKING:  # never run: it makes `save_pretrained` carry the file to the Hub, where modules.json names it
    from .sentence_transformer_sail import SailSentenceTransformer  # noqa: F401

TASKS = ("i2i", "q2i", "cls")
SIDES = ("query", "target")

# Section 3.2.2: every task family has a pair of instructions, one for each side. Short, because each word is a token of
# every item. They are saved with the processor (processor_config.json) and may be edited there.
INSTRUCTIONS = {
    "i2i": {"query": "Find similar items:", "target": "Similar item:"},
    "q2i": {"query": "Find an item for the query:", "target": "Item to be found:"},
    "cls": {"query": "Name the item:", "target": "Name:"},
}

# Measured on two cores: passes of 1k to 2k tokens stay in the cache; 4k and more lose. Without padding 2k is best.
TOKEN_BUDGET = 2048
# Passes that suit a CPU's cache would leave an accelerator waiting for its next kernel. Not measured.
ACCELERATOR_TOKEN_BUDGET = 16_384

_CONTENT = "<<<sail-content>>>"  # marks the place of the item in a rendered chat template


@dataclass(frozen=True)
class Layout:
    """What a sequence holds besides its prompt: cleaned texts by field, pictures and frames, whether there is sound."""

    texts: dict[str, str] = field(default_factory=dict)
    num_images: int = 0
    has_audio: bool = False


class SailEmbeddingProcessor(ProcessorMixin):
    """Items and a task to one ``BatchFeature`` that `SailEmbeddingModel` takes.

    Args:
        image_processor: the vision tower's; any transformers image processor.
        feature_extractor: the audio tower's; Whisper's or CLAP's.
        tokenizer: the fusion backbone's.
        modalities: which of "vision" and "audio" the model has a tower for; text is always there.
        num_latents: placeholders of an item's pictures (of each picture with ``latents_per_frame``).
        latents_per_frame: as in the model's configuration.
        image_token, audio_token: the placeholders, one token each of the tokenizer.
        audio_window_seconds: the audio tower's window. Shorter sound is repeated to fill it, longer is cut into
            consecutive windows, the last one filled by repetition (section 3.2).
        max_tokens: longest sequence; text is cut to fit, the least important field first (``IMPORTANCE_ORDER``).
        frames_per_video: frames sampled uniformly from a video.
        max_audio_seconds: longer sound is cut.
        max_frames: most pictures and frames of an item, as in the model's configuration; more are the item's error.
        prompt_format: "chat" (the tokenizer's chat template), "plain", or "auto": chat where there is a template.
        end_token: what follows the opening of the assistant's turn in the chat form, if the tokenizer knows it.
        instructions: ``{task: {"query": ..., "target": ...}}``; the three families of the paper by default.
    """

    def __init__(
        self,
        image_processor: Any,
        feature_extractor: Any,
        tokenizer: Any,
        modalities: Sequence[str] = ("vision", "audio"),
        num_latents: int = 16,
        latents_per_frame: bool = False,
        image_token: str = "<|image_pad|>",
        audio_token: str = "<|audio_pad|>",
        audio_window_seconds: float = 10.0,
        max_tokens: int = 512,
        frames_per_video: int = 8,
        max_audio_seconds: float = 60.0,
        max_frames: int = 64,
        prompt_format: str = "auto",
        end_token: str = "<|endoftext|>",
        instructions: dict[str, dict[str, str]] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.modalities = list(modalities)
        self.num_latents = num_latents
        self.latents_per_frame = latents_per_frame
        self.image_token = image_token
        self.audio_token = audio_token
        self.audio_window_seconds = audio_window_seconds
        self.max_tokens = max_tokens
        self.frames_per_video = frames_per_video
        self.max_audio_seconds = max_audio_seconds
        self.max_frames = max_frames
        self.end_token = end_token
        self.instructions = instructions or {task: dict(pair) for task, pair in INSTRUCTIONS.items()}
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)
        self.prompt_format = self._checked_format(prompt_format)
        self.image_token_id = self._placeholder(image_token)
        self.audio_token_id = self._placeholder(audio_token)
        self._prompts: dict[str, tuple[list[int], list[int]]] = {}

    # -- items to a batch --------------------------------------------------------------------------------------------

    def __call__(
        self,
        items: Sequence[Any],
        task: str | None = None,
        side: str = "query",
        errors: str = "raise",
        instruction: str | None = None,
        allow_urls: bool = False,
        use_video_audio: bool = True,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Load, clean and lay out a batch of items.

        Args:
            items: dicts, strings or PIL images; see ``items_sail``.
            task: "i2i", "q2i", "cls" (or another key of ``instructions``), or None for no instruction.
            side: "query" or "target".
            errors: "raise" lists every bad item in one error; "skip" leaves bad items out: the batch holds the good
                ones in order, and ``batch.statuses`` one `ItemStatus` for every item that was given.
            instruction: takes the place of the task's instruction.
            allow_urls: fetch http(s) media.
            use_video_audio: take a video's own sound track where the item has no ``audio``.
            return_tensors: "pt"; kept because every transformers processor has it.

        Returns:
            ``input_ids``, ``attention_mask``, ``modality_ids``, each (B, L); with pictures ``pixel_values``
            (N, 3, H, W), ``image_owner`` (N,), ``frame_positions`` (N,); with sound ``input_features`` (M, ...) and
            ``audio_owner`` (M,).

        Raises:
            ItemsError: items that cannot be read, all of them listed. ValueError: a bad task, side or option.
        """
        if return_tensors != "pt":
            raise ValueError(
                f"return_tensors={return_tensors!r} is not supported; the model takes torch tensors ('pt')."
            )
        instruction = self.instruction_for(task, side, instruction)
        loaded, statuses = self.load(items, errors, allow_urls, use_video_audio, instruction)
        return self.collate(loaded, instruction, statuses)

    def load(
        self,
        items: Sequence[Any],
        errors: str = "raise",
        allow_urls: bool = False,
        use_video_audio: bool = True,
        instruction: str = "",
    ) -> tuple[list[LoadedItem], list[ItemStatus]]:
        """The good items, decoded, and a status for every item; the first half of ``__call__``.

        Good is what `sequence` has room for beside this instruction, so no item fails after it was loaded with it.
        """
        options = LoadOptions(
            sampling_rate=self.feature_extractor.sampling_rate,
            num_frames=self.frames_per_video,
            use_video_audio=use_video_audio,
            load_vision="vision" in self.modalities,
            load_audio="audio" in self.modalities,
            allow_urls=allow_urls,
            max_audio_seconds=self.max_audio_seconds,
            max_frames=self.max_frames,
        )
        return load_items(items, options, errors, partial(self._check_room, instruction=instruction))

    def collate(
        self, loaded: Sequence[LoadedItem], instruction: str = "", statuses: Sequence[ItemStatus] = ()
    ) -> BatchFeature:
        """Decoded items to one batch; the second half of ``__call__``. An empty list gives a batch of no rows."""
        batch: Any = self.assemble(loaded, [self.sequence(layout_of(item), instruction) for item in loaded])
        batch.statuses = list(statuses)
        return batch

    def assemble(self, loaded: Sequence[LoadedItem], sequences: Sequence[tuple[list[int], list[int]]]) -> BatchFeature:
        """Decoded items and the sequence of each to one batch."""
        data = self.pad(sequences)
        with torch.autocast("cpu", enabled=False):  # the model's; Whisper's extractor multiplies matrices, in float32
            data |= self._pictures([(*item.images, *item.frames) for item in loaded])
            data |= self._windows([item.audio for item in loaded])
        return BatchFeature(data)

    def batches(
        self, loaded: Sequence[LoadedItem], instruction: str = "", token_budget: int | None = None
    ) -> Iterator[tuple[list[int], BatchFeature]]:
        """Cut decoded items into batches of at most ``token_budget`` padded tokens, the longest items first.

        Yields:
            The places of the batch's items in ``loaded``, and the batch. Pictures and sounds of a batch are turned into
            tensors only when it is asked for.

        Raises:
            ValueError: a budget that is no whole number above 0.
        """
        if token_budget is None:
            token_budget = TOKEN_BUDGET
        if isinstance(token_budget, bool) or not isinstance(token_budget, Integral) or token_budget < 1:
            raise ValueError(f"token_budget={token_budget!r} must be a whole number of tokens above 0, or None.")
        sequences = [self.sequence(layout_of(item), instruction) for item in loaded]
        for places in token_batches([len(ids) for ids, _ in sequences], int(token_budget)):
            yield places, self.assemble([loaded[place] for place in places], [sequences[place] for place in places])

    @staticmethod
    def default_token_budget(device: str) -> int:
        """Padded tokens of one pass that suit a device."""
        return TOKEN_BUDGET if torch.device(device).type == "cpu" else ACCELERATOR_TOKEN_BUDGET

    @property
    def model_input_names(self) -> list[str]:
        return [
            *("input_ids", "attention_mask", "modality_ids"),
            *("pixel_values", "image_owner", "frame_positions"),
            *("input_features", "audio_owner"),
        ]

    # -- prompt ------------------------------------------------------------------------------------------------------

    def instruction_for(self, task: str | None, side: str, instruction: str | None = None) -> str:
        """The instruction of a task and side; ``instruction`` itself where it is given; "" without a task."""
        if side not in SIDES:
            raise ValueError(f"side={side!r} is not one of {SIDES}.")
        if instruction is not None:
            return instruction
        if task is None:
            return ""
        if task not in self.instructions:
            raise ValueError(f"task={task!r} has no instructions; take one of {sorted(self.instructions)}, or None.")
        return self.instructions[task][side]

    def prompts(self) -> dict[str, str]:
        """``{"i2i_query": instruction, ...}`` and "query"/"document" for q2i: the names sentence-transformers uses."""
        named = {f"{task}_{side}": self.instructions[task][side] for task in self.instructions for side in SIDES}
        if "q2i" in self.instructions:
            named |= {"query": named["q2i_query"], "document": named["q2i_target"]}
        return named

    def _prompt_ids(self, instruction: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the item. Rendered once for each instruction."""
        if instruction not in self._prompts:
            render = self._chat_prompt if self.prompt_format == "chat" else self._plain_prompt
            self._prompts[instruction] = render(instruction)
        return self._prompts[instruction]

    def _chat_prompt(self, instruction: str) -> tuple[list[int], list[int]]:
        """System: the instruction. User: the item. Assistant: the opening of its turn and the end token (Fig. 5)."""
        system = [{"role": "system", "content": instruction}] if instruction else []
        messages = [*system, {"role": "user", "content": _CONTENT}]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if rendered.count(_CONTENT) != 1:
            raise ValueError("The tokenizer's chat template does not keep the user's text; take prompt_format='plain'.")
        before, after = rendered.split(_CONTENT)
        known = self.tokenizer.convert_tokens_to_ids(self.end_token) not in (None, self.tokenizer.unk_token_id)
        return self._special_ids(before), self._special_ids(after + (self.end_token if known else ""))

    def _plain_prompt(self, instruction: str) -> tuple[list[int], list[int]]:
        """[start token] instruction, the item, [end token]: whatever the tokenizer puts around a text."""
        around = self.tokenizer("")["input_ids"]
        starts = {self.tokenizer.cls_token_id, self.tokenizer.bos_token_id} - {None}
        before = [token for token in around if token in starts]
        return before + self._text_ids(instruction), [token for token in around if token not in starts]

    # -- text --------------------------------------------------------------------------------------------------------

    def sequence(self, layout: Layout, instruction: str = "") -> tuple[list[int], list[int]]:
        """Token ids and segment ids of one item: prompt, audio, vision, text, end of prompt (Fig. 5)."""
        before, after = self._prompt_ids(instruction)
        media = self._placeholders(layout)
        text = self._fitted_text(layout.texts, self.max_tokens - len(before) - len(after) - len(media))
        ids = before + [token for token, _ in media] + text + after
        segments = [PROMPT] * len(before) + [segment for _, segment in media] + [TEXT] * len(text)
        return ids, segments + [PROMPT] * len(after)

    def _placeholders(self, layout: Layout) -> list[tuple[int, int]]:
        """Token and segment of each place that sound and pictures take."""
        images = layout.num_images if self.latents_per_frame else min(layout.num_images, 1)
        media = [(self.audio_token_id, AUDIO)] * int(layout.has_audio)
        return media + [(self.image_token_id, VISION)] * (self.num_latents * images)

    def _check_room(self, item: LoadedItem, instruction: str) -> None:
        """Refuse an item of which not even the first token of its text would fit."""
        layout = layout_of(item)
        fixed = sum(map(len, self._prompt_ids(instruction))) + len(self._placeholders(layout))
        try:
            self._check_rest(self.max_tokens - fixed, layout.texts)
        except ValueError as error:
            field = "images" if len(item.images) > 1 else "image" if item.images else "video" if item.frames else "item"
            raise ItemError(item.index, item.id, field, str(error)) from error

    def _check_rest(self, room: int, texts: dict[str, str]) -> None:
        if room < int(bool(texts)):
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves no room for text beside the prompt and the placeholders; "
                "raise it, or give the item fewer pictures."
            )

    def _fitted_text(self, texts: dict[str, str], room: int) -> list[int]:
        """Token ids of the rendered fields, cut to ``room``: the least important field loses its end first."""
        self._check_rest(room, texts)
        fields = {name: self._text_ids(segment) for name, segment in render_texts(texts)}
        excess = sum(map(len, fields.values())) - room
        for name in reversed(IMPORTANCE_ORDER):
            if excess > 0 and name in fields:
                cut = min(excess, len(fields[name]))
                fields[name] = fields[name][: len(fields[name]) - cut]
                excess -= cut
        return [token for tokens in fields.values() for token in tokens]

    def _text_ids(self, text: str) -> list[int]:
        """Ids of plain text. A special token that a user typed is dropped: text can't pose as a picture."""
        if not text:
            return []
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        special |= {self.image_token_id, self.audio_token_id}
        ids = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return [token for token in ids if token not in special]

    def _special_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"] if text else []

    def pad(self, sequences: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """Ragged (ids, segments) to ``input_ids``, ``attention_mask``, ``modality_ids`` (B, L), padded at the end."""
        length = max((len(ids) for ids, _ in sequences), default=0)
        input_ids = torch.full((len(sequences), length), self.tokenizer.pad_token_id or 0)
        modality_ids = torch.full((len(sequences), length), PAD)
        for row, (ids, segments) in enumerate(sequences):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            modality_ids[row, : len(ids)] = torch.tensor(segments)
        return {"input_ids": input_ids, "attention_mask": (modality_ids != PAD).long(), "modality_ids": modality_ids}

    # -- pictures and sound ------------------------------------------------------------------------------------------

    def _pictures(self, pictures: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        flat = [picture for owned in pictures for picture in owned]
        if not flat:
            return {}
        # One picture at a time: sizes differ, and some processors group by size, which would let a neighbour in.
        pixels = [self.image_processor(images=picture, return_tensors="np")["pixel_values"][0] for picture in flat]
        return {
            "pixel_values": torch.from_numpy(np.stack(pixels)),
            "image_owner": _owners([len(owned) for owned in pictures]),
            "frame_positions": torch.tensor([place for owned in pictures for place in range(len(owned))]),
        }

    def _windows(self, sounds: Sequence[np.ndarray | None]) -> dict[str, Tensor]:
        windows = [[] if sound is None else self.audio_windows(sound) for sound in sounds]
        flat = [window for owned in windows for window in owned]
        if not flat:
            return {}
        return {"input_features": self._audio_features(flat), "audio_owner": _owners([len(owned) for owned in windows])}

    def audio_windows(self, sound: np.ndarray) -> list[np.ndarray]:
        """(S,) samples to windows of exactly ``audio_window_seconds``: repeat-and-pad, or consecutive cuts."""
        size = round(self.audio_window_seconds * self.feature_extractor.sampling_rate)
        return [np.resize(sound[start : start + size], size) for start in range(0, len(sound), size)]

    def _audio_features(self, windows: list[np.ndarray]) -> Tensor:
        """(M, ...) input of the audio tower. Windows fit exactly: the extractor neither pads, cuts nor crops at random.

        Only arguments given here reach the extractor: a tokenizer's saved ``max_length`` must never cut a sound.
        """
        extractor, rate = self.feature_extractor, self.feature_extractor.sampling_rate
        features = []
        for window in windows:  # one at a time: an extractor that normalises must not see a neighbour
            made = extractor(
                window, sampling_rate=rate, return_tensors="np", max_length=len(window), truncation=_cut(extractor)
            )
            features.append(torch.from_numpy(np.asarray(made["input_features"], dtype=np.float32)))
        return torch.cat(features)

    # -- saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As in transformers, and what ``SentenceTransformer(folder)`` looks for: modules.json, its configuration."""
        files = super().save_pretrained(save_directory, push_to_hub=False, **kwargs)
        for name, content in self._sentence_transformer_files().items():
            path = Path(save_directory) / name
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            files.append(str(path))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def _sentence_transformer_files(self) -> dict[str, Any]:
        module = "sentence_transformer_sail.SailSentenceTransformer"
        return {
            "modules.json": [{"idx": 0, "name": "0", "path": "", "type": module}],
            "config_sentence_transformers.json": {
                "model_type": "SentenceTransformer",
                "prompts": self.prompts(),
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
        }

    # -- checks ------------------------------------------------------------------------------------------------------

    def _checked_format(self, name: str) -> str:
        if name not in ("auto", "chat", "plain"):
            raise ValueError(f"prompt_format={name!r} is not one of 'auto', 'chat', 'plain'.")
        template = getattr(self.tokenizer, "chat_template", None)
        if name == "chat" and not template:
            raise ValueError("prompt_format='chat' needs a tokenizer with a chat template; take 'plain'.")
        return ("chat" if template else "plain") if name == "auto" else name

    def _placeholder(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no token {token!r}; name one that it has, or add it as a special token."
            )
        return token_id


def token_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Sort by length, longest first, and cut where one more row would pad the batch beyond the budget.

    Args:
        lengths: tokens of each item.
        token_budget: rows times the longest row of a batch, at most; one item longer than that is a batch of its own.

    Returns:
        Lists of indices into ``lengths``, each index once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > token_budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def layout_of(item: LoadedItem) -> Layout:
    """What the sequence of a decoded item holds."""
    return Layout(item.texts, len(item.images) + len(item.frames), item.audio is not None)


def _owners(counts: Sequence[int]) -> Tensor:
    """[2, 0, 1] -> tensor([0, 0, 2])."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _cut(extractor: Any) -> bool | str:
    """CLAP's default truncation makes four views of a sound, and knows no False; its other mode leaves a fit alone."""
    return "rand_trunc" if "Clap" in type(extractor).__name__ else True


SailEmbeddingProcessor.register_for_auto_class()
