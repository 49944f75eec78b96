"""ACE-Step v1 from one published file: diffusion model, text encoder and sound autoencoder, ready for the nodes.

The file holds all three under prefixes. Nothing is read here but shapes; weights come when first used. Latents need no
scaling between autoencoder and network. ComfyUI leaves dropout on in the lyric encoder at inference; this engine never
does, so on stock ComfyUI the same seed gives another song.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from comfyfleet.engine.models.ace_dcae import AceDcae
from comfyfleet.engine.models.ace_lyrics.tokenizer import START_ID, LyricTokenizer, LyricVocabularyMissing
from comfyfleet.engine.models.ace_mel import SAMPLE_RATE_HZ, log_mel
from comfyfleet.engine.models.ace_transformer import (
    AceTransformer,
    PreparedContext,
    Rotary,
    TransformerSizes,
    rotary_tables,
)
from comfyfleet.engine.models.ace_vocoder import AceVocoder
from comfyfleet.engine.models.checkpoint import Checkpoint
from comfyfleet.engine.models.prompt_weights import parse, words_naming_files
from comfyfleet.engine.models.residency import Precision, Resident, Source
from comfyfleet.engine.models.umt5 import ACE_USE, Umt5Encoder, open_umt5
from comfyfleet.engine.sampling.schedules import FlowSigmas
from comfyfleet.engine.values import Audio, ConditioningEntry, DiffusionModel
from comfyfleet.wire.errors import ModelFileUnusable

DEFAULT_SHIFT = 3.0
LATENT_SCALE, LATENT_SHIFT = 0.1786, -1.9091
QUIETEST_MEL, LOUDEST_MEL = -11.0, 3.0
SAMPLES_PER_COLUMN = 4096
LOUDNESS_DEVIATIONS = 5.0  # a waveform whose deviation exceeds 1/5 is made quieter to it
PRECISION = Precision(on_cuda=torch.bfloat16)
OWN_VOCABULARY = "text_encoders.ace_lyrics_vocab"  # uint8 JSON in a miniature; published files have none


def load(checkpoint: Checkpoint, device: str = "cpu") -> tuple[DiffusionModel, AceTextEncoder, AceAutoencoder]:
    """The three parts of an all-in-one file. Raises ModelFileUnusable where one is missing."""
    model = open_diffusion(checkpoint.section("model.diffusion_model."), device)
    return model, open_text_encoder(checkpoint, device), open_autoencoder(checkpoint.section("vae."), device)


def open_diffusion(section: Checkpoint, device: str = "cpu", round_to: torch.dtype | None = None) -> DiffusionModel:
    """The diffusion model alone; its weights are rounded to `round_to` first, when one is given."""
    TransformerSizes.of(section)  # refuse now, not at the first step
    precision = replace(PRECISION, round_to=round_to)
    return DiffusionModel(
        family="ace_step",
        network=AceNetwork(Source(checkpoint=section, build=build_transformer, precision=precision), device),
        prediction="flow",
        sigmas=FlowSigmas(DEFAULT_SHIFT),
        latent_format=AceLatentFormat(),
    )


def build_transformer(section: Checkpoint) -> AceTransformer:
    return AceTransformer(TransformerSizes.of(section))


class AceLatentFormat:
    """The network works on latents as they are."""

    channels, axes = 8, 2

    def to_network(self, samples: Tensor) -> Tensor:
        return samples

    def from_network(self, samples: Tensor) -> Tensor:
        return samples


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """The conditioning is kept beside what was made from it: while it lives, no other one can have its id."""

    conditioning: ConditioningEntry
    context: PreparedContext


class AceNetwork(Resident[AceTransformer]):
    """The diffusion model as a Denoiser. Context, its keys and values, and rotary factors last for one run."""

    def __init__(self, source: Source[AceTransformer], device: str = "cpu") -> None:
        super().__init__(source, device)
        self._prepared: dict[int, _Prepared] = {}
        self._rotary: dict[int, Rotary] = {}

    @torch.no_grad()
    def forward(self, x: Tensor, timestep: Tensor, conditioning: ConditioningEntry) -> Tensor:
        """x: (B, 8, 16, columns); timestep: (B,) = 1000 sigma -> velocity, float32, on x's device."""
        network, batch = self.network(), x.shape[0]
        context = self._context(network, conditioning).expand(batch)
        tokens = x.shape[-1] // network.sizes.patch[1]
        rotary = self._rotary.setdefault(tokens, rotary_tables(tokens, torch.device(self.device)))
        moved, time = x.to(self.device, self.dtype), timestep.to(self.device).expand(batch)
        return network(moved, time, context, rotary).float().to(x.device)

    def _context(self, network: AceTransformer, conditioning: ConditioningEntry) -> PreparedContext:
        known = self._prepared.get(id(conditioning))
        if known is None:
            ids = _checked_lyrics(conditioning, network.sizes)
            text = conditioning.embedding.to(self.device, self.dtype)
            context = network.encode_context(text, ids.to(self.device), conditioning.lyrics_strength)
            known = _Prepared(conditioning=conditioning, context=network.prepare(context))
            self._prepared[id(conditioning)] = known
        return known.context

    def end_of_run(self) -> None:
        self._prepared.clear()
        self._rotary.clear()

    def move_to(self, device: str) -> None:
        if device != self.device:
            self.end_of_run()
        super().move_to(device)


def _checked_lyrics(conditioning: ConditioningEntry, sizes: TransformerSizes) -> Tensor:
    """The lyric ids of a prompt that this model can read. Raises ModelFileUnusable, saying whose prompt it is instead.

    Checked before the embedding is: an id beyond its rows would end the whole process on a GPU.
    """
    ids, text_width = conditioning.lyric_ids, conditioning.embedding.shape[-1]
    if ids is None:
        raise ModelFileUnusable("an ACE-Step model needs lyrics: encode its prompts with TextEncodeAceStepAudio")
    if text_width != sizes.text_width or int(ids.max()) >= sizes.lyric_rows:
        raise ModelFileUnusable("this prompt was encoded for another ACE-Step checkpoint: use the same file's CLIP")
    return ids


class AceTextEncoder:
    """Tags through UMT5-base, lyrics to ids. Lyrics are encoded by the diffusion model, so only ids travel.

    own_vocabulary: of a miniature; a published checkpoint's lyrics need the authors' vocabulary file.
    """

    def __init__(self, tags: Umt5Encoder, own_vocabulary: LyricTokenizer | None) -> None:
        self._tags = tags
        self.own_vocabulary = own_vocabulary
        self.size_bytes = tags.size_bytes

    @property
    def key(self) -> str:
        return self._tags.key

    @property
    def device(self) -> str:
        return self._tags.device

    @property
    def is_pinned(self) -> bool:
        return self._tags.is_pinned

    def encode(self, text: str) -> ConditioningEntry:
        """Tags alone, without a word of lyrics."""
        return self.encode_song(text, "", 1.0, vocabulary=None)

    def encode_song(
        self, tags: str, lyrics: str, lyrics_strength: float, *, vocabulary: LyricTokenizer | None
    ) -> ConditioningEntry:
        """One song's conditioning. `vocabulary` is used where the file brings none; None will do for no lyrics.

        (text:1.2) weights count for tags; in lyrics they only begin a new line, as in ComfyUI.
        """
        segments = [part for piece in parse(lyrics) for part in words_naming_files(piece.text)]
        tokenizer = self.own_vocabulary or vocabulary
        if tokenizer is None and segments:
            raise LyricVocabularyMissing.here()
        ids = tokenizer.encode(segments) if tokenizer else [START_ID]
        entry = self._tags.encode(tags)
        return ConditioningEntry(
            embedding=entry.embedding, lyric_ids=torch.tensor([ids]), lyrics_strength=lyrics_strength
        )

    def move_to(self, device: str) -> None:
        self._tags.move_to(device)

    def free(self) -> None:
        self._tags.free()


def open_text_encoder(checkpoint: Checkpoint, device: str = "cpu") -> AceTextEncoder:
    """UMT5-base with its tokenizer; weights are rounded to float16 first, as ComfyUI holds them."""
    section = checkpoint.section("text_encoders.umt5base.transformer.")
    pieces = checkpoint.tensor("text_encoders.spiece_model")
    tags = open_umt5(section, pieces, ACE_USE, round_to=torch.float16, device=device)
    own = None
    if OWN_VOCABULARY in checkpoint:
        own = LyricTokenizer.from_json(bytes(checkpoint.tensor(OWN_VOCABULARY).numpy()).decode())
    return AceTextEncoder(tags, own)


class AceSound(nn.Module):
    """DCAE and vocoder, named as in the file."""

    def __init__(self, section: Checkpoint) -> None:
        super().__init__()
        self.dcae = AceDcae(section.section("dcae."))
        self.vocoder = AceVocoder(section.section("vocoder."))

    def waveform(self, latents: Tensor) -> Iterator[Tensor]:
        """(1, 8, 16, columns) -> pieces (2, samples) in order: 4096 samples a column."""
        mel = self.dcae.decoder(latents / LATENT_SCALE + LATENT_SHIFT)[0]  # (2, 128, 8 columns), -1 … 1
        mel = (mel * 0.5 + 0.5) * (LOUDEST_MEL - QUIETEST_MEL) + QUIETEST_MEL
        return self.vocoder.windows(mel)

    def latents(self, waveform: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 2, samples) float32, samples a multiple of 4096 -> (B, 8, 16, samples / 4096), encoded in `dtype`."""
        batch, channels, samples = waveform.shape
        mel = (log_mel(waveform.reshape(-1, samples)) - QUIETEST_MEL) / (LOUDEST_MEL - QUIETEST_MEL)
        spectrogram = ((mel - 0.5) / 0.5).view(batch, channels, *mel.shape[1:])
        return (self.dcae.encoder(spectrogram.to(dtype)) - LATENT_SHIFT) * LATENT_SCALE


class AceAutoencoder(Resident[AceSound]):
    """The sound autoencoder: 44.1 kHz stereo."""

    @torch.no_grad()
    def decode_audio(self, samples: Tensor, before_piece: Callable[[], None] = lambda: None) -> Audio:
        """(B, 8, 16, columns) -> (B, 2, 4096 columns), each divided by max(1, 5 deviations) against clipping."""
        network = self.network()
        waveforms = []
        for latents in samples:
            played = []
            for piece in network.waveform(latents[None].to(self.device, self.dtype)):
                before_piece()
                played.append(piece.float().cpu())
            waveforms.append(torch.cat(played, dim=-1))
        waveform = torch.stack(waveforms)
        deviation = waveform.std(dim=(1, 2), keepdim=True)
        return Audio(
            waveform=waveform / (LOUDNESS_DEVIATIONS * deviation).clamp_min(1.0), sample_rate_hz=SAMPLE_RATE_HZ
        )

    @torch.no_grad()
    def encode_audio(self, audio: Audio) -> Tensor:
        """44.1 kHz, mono or stereo -> (B, 8, 16, samples // 4096); a remainder is cut from both ends alike."""
        waveform = audio.waveform
        if waveform.shape[1] == 1:
            waveform = waveform.expand(-1, 2, -1)
        columns, remainder = divmod(waveform.shape[-1], SAMPLES_PER_COLUMN)
        if audio.sample_rate_hz != SAMPLE_RATE_HZ:
            raise ValueError(f"sound must be resampled to {SAMPLE_RATE_HZ} Hz first, not {audio.sample_rate_hz}")
        if not columns:
            raise ValueError(f"sound shorter than {SAMPLES_PER_COLUMN} samples cannot be encoded")
        start = remainder // 2
        waveform = waveform[:, :2, start : start + columns * SAMPLES_PER_COLUMN]
        rows = [self.network().latents(row[None].to(self.device), self.dtype) for row in waveform]
        return torch.cat(rows).float().cpu()


def open_autoencoder(section: Checkpoint, device: str = "cpu") -> AceAutoencoder:
    for part in ("dcae.decoder.conv_in.weight", "vocoder.head.conv_pre.bias"):
        section.shape(part)  # refuse now, not at the first decode
    return AceAutoencoder(Source(checkpoint=section, build=AceSound, precision=PRECISION), device)
