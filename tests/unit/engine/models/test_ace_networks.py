"""ACE-Step's networks compute what ComfyUI 0.3.64 computes from the same file (goldens/ace/given_ids)."""

from dataclasses import replace

import pytest
import torch

from comfyfleet.engine.models.ace_transformer import PUBLISHED_SIZES, AceTransformer, rotary_tables
from comfyfleet.engine.models.checkpoint import open_checkpoint
from comfyfleet.engine.values import Audio, ConditioningEntry
from comfyfleet.wire.errors import ModelFileUnusable
from engine_ace import CHECKPOINT, parts
from engine_goldens import relative_error, tensors

TIGHT = 1e-5


@pytest.fixture
def given():
    return tensors("ace/given_ids/record")


@pytest.fixture
def network():
    return parts()[0].network.network()


@torch.no_grad()
def test_the_lyric_encoder_equals_the_reference(given, network):
    assert relative_error(network.encode_lyrics(given["lyric_ids"], torch.float32), given["lyric_encoder"]) <= TIGHT


@torch.no_grad()
def test_the_context_is_speaker_tags_and_weighted_lyrics(given, network):
    context = network.encode_context(given["text"], given["lyric_ids"], 0.8)

    assert relative_error(context, given["context"]) <= TIGHT


@torch.no_grad()
def test_one_forward_equals_the_reference(given, network):
    rotary = rotary_tables(given["forward.x"].shape[-1], torch.device("cpu"))
    velocity = network(given["forward.x"], given["forward.timestep"], network.prepare(given["context"]), rotary)

    assert relative_error(velocity, given["forward.output"]) <= TIGHT


@torch.no_grad()
def test_latents_become_the_reference_mel_and_waveform(given):
    sound = parts()[2].network()
    mel = sound.dcae.decoder(given["vae.latent"] / 0.1786 - 1.9091)[0] * 7 - 4

    assert relative_error(mel, given["vae.mel"]) <= TIGHT
    assert relative_error(sound.vocoder(given["vae.mel"])[:, :4096], given["vae.vocoder_output"]) <= TIGHT


@pytest.mark.slow  # importing diffusers takes most of it
@torch.no_grad()
def test_encoder_and_decoder_equal_an_independent_implementation():
    from diffusers import AutoencoderDC

    stored = open_checkpoint(CHECKPOINT).section("vae.dcae.")
    independent = AutoencoderDC(
        in_channels=2,
        latent_channels=8,
        encoder_block_types=["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
        decoder_block_types=["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
        encoder_block_out_channels=[8, 16, 16, 32],
        decoder_block_out_channels=[8, 16, 16, 32],
        encoder_layers_per_block=[1, 1, 1, 1],
        decoder_layers_per_block=[1, 1, 1, 1],
        encoder_qkv_multiscales=[[], [], [], [5]],
        decoder_qkv_multiscales=[[], [], [], [5]],
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
    )
    independent.load_state_dict({name: stored.tensor(name).float() for name in stored})
    ours = parts()[2].network().dcae
    dice = torch.Generator().manual_seed(1)
    spectrogram, latents = torch.randn(1, 2, 128, 160, generator=dice), torch.randn(1, 8, 16, 150, generator=dice)

    assert relative_error(ours.encoder(spectrogram), independent.encoder(spectrogram)) <= TIGHT
    assert relative_error(ours.decoder(latents), independent.decoder(latents)) <= TIGHT


@torch.no_grad()
@pytest.mark.parametrize(("columns", "window"), [(7, 1), (24, 5)])
def test_decoding_in_windows_changes_nothing(columns, window):
    sound = parts()[2].network()
    latents = torch.randn(1, 8, 16, columns, generator=torch.Generator().manual_seed(columns))
    mel = sound.dcae.decoder(latents, window=columns)
    waveform = sound.vocoder(mel[0] * 7 - 4, backbone_window=8 * columns, head_window=8 * columns)

    assert relative_error(sound.dcae.decoder(latents, window=window), mel) <= TIGHT
    pieces = sound.vocoder(mel[0] * 7 - 4, backbone_window=window, head_window=2 * window)
    assert relative_error(pieces, waveform) <= TIGHT


def test_a_batch_is_as_good_as_its_parts(given):
    model = parts()[0].network
    entry = ConditioningEntry(embedding=given["text"], lyric_ids=given["lyric_ids"], lyrics_strength=0.8)
    pair = ConditioningEntry(
        embedding=torch.cat([given["text"], given["text"] * 0]),
        lyric_ids=torch.cat([given["lyric_ids"], given["lyric_ids"] * 0]),
        lyrics_strength=0.8,
    )
    nothing = ConditioningEntry(embedding=given["text"] * 0, lyric_ids=given["lyric_ids"] * 0, lyrics_strength=0.8)
    x, time = given["forward.x"][:1], torch.tensor([700.0])

    both = model.forward(torch.cat([x, x]), time.expand(2), pair)

    assert relative_error(both[:1], model.forward(x, time, entry)) <= TIGHT
    assert relative_error(both[1:], model.forward(x, time, nothing)) <= TIGHT
    assert relative_error(model.forward(torch.cat([x, x]), time.expand(2), entry)[1:], both[:1]) <= TIGHT
    model.end_of_run()


def test_strength_zero_silences_the_words(given):
    model = parts()[0].network
    x, time = given["forward.x"][:1], torch.tensor([700.0])
    words = ConditioningEntry(embedding=given["text"], lyric_ids=given["lyric_ids"], lyrics_strength=0.0)
    others = ConditioningEntry(embedding=given["text"], lyric_ids=given["lyric_ids"].flip(1), lyrics_strength=0.0)
    loud = ConditioningEntry(embedding=given["text"], lyric_ids=given["lyric_ids"].flip(1), lyrics_strength=1.0)

    assert torch.equal(model.forward(x, time, words), model.forward(x, time, others))
    assert relative_error(model.forward(x, time, loud), model.forward(x, time, others)) > 1e-3
    model.end_of_run()


def test_the_context_is_made_once_a_run_and_forgotten_at_its_end(given):
    model = parts()[0].network
    entry = ConditioningEntry(embedding=given["text"], lyric_ids=given["lyric_ids"], lyrics_strength=0.8)
    x = given["forward.x"][:1]

    model.forward(x, torch.tensor([900.0]), entry)
    first = model._prepared[id(entry)].context
    model.forward(x, torch.tensor([800.0]), entry)
    assert model._prepared[id(entry)].context is first

    model.end_of_run()
    assert not model._prepared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lyric_ids": None}, "needs lyrics"),
        ({"lyric_ids": torch.tensor([[261, 6693]])}, "another ACE-Step checkpoint"),
        ({"embedding": torch.zeros(1, 9, 768)}, "another ACE-Step checkpoint"),
    ],
)
def test_a_prompt_of_another_model_is_refused_before_it_is_read(given, change, message):
    prompt = ConditioningEntry(embedding=given["text"], lyric_ids=given["lyric_ids"])

    with pytest.raises(ModelFileUnusable, match=message):
        parts()[0].network.forward(given["forward.x"][:1], torch.tensor([700.0]), replace(prompt, **change))


def test_mono_and_stereo_sound_is_encoded():
    vae = parts()[2]
    dice = torch.Generator().manual_seed(3)

    stereo = vae.encode_audio(Audio(waveform=torch.randn(2, 2, 3 * 4096 + 100, generator=dice), sample_rate_hz=44_100))
    mono = vae.encode_audio(Audio(waveform=torch.randn(1, 1, 44_100, generator=dice), sample_rate_hz=44_100))

    assert stereo.shape == (2, 8, 16, 3)
    assert mono.shape == (1, 8, 16, 10)
    with pytest.raises(ValueError, match="shorter than 4096"):
        vae.encode_audio(Audio(waveform=torch.zeros(1, 2, 4000), sample_rate_hz=44_100))


def test_a_loud_waveform_is_turned_down_and_a_quiet_one_is_not(given):
    vae = parts()[2]
    with torch.no_grad():
        raw = torch.cat(list(vae.network().waveform(given["vae.latent"])), dim=-1)
    played = vae.decode_audio(given["vae.latent"])

    assert played.sample_rate_hz == 44_100
    assert played.waveform.shape == (1, 2, 4 * 4096)
    assert relative_error(played.waveform[0], raw / max(1.0, float(5 * raw.std()))) <= TIGHT


def test_the_published_sizes_make_the_published_model():
    """Width 2560 (20 heads), 24 blocks, a lyric encoder of 1024 x 6; nothing is allocated here."""
    network = AceTransformer(PUBLISHED_SIZES)

    weights = sum(each.numel() for each in network.parameters())
    assert all(each.is_meta for each in network.parameters())
    assert 2.58e9 < weights < 2.60e9, "of 3.3: cross-attention's add_* and the training projectors are not read"
