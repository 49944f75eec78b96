"""Films to files: H.264 in MP4 with x264's defaults, VP9 or AV1 in WebM. Frames go to the encoder one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import av
from torch import Tensor

from comfyfleet.engine.media.pictures import to_bytes
from comfyfleet.engine.values import Audio, Video

WEBM_CODECS = {"vp9": ("libvpx-vp9", "yuv420p"), "av1": ("libsvtav1", "yuv420p10le")}


def frame_rate(fps: float | Fraction) -> Fraction:
    """To a thousandth, as ComfyUI rounds it: 29.97 is 2997/100."""
    return Fraction(round(fps * 1000), 1000)


def keep_going() -> None:
    """What is done before each frame when nobody may stop the encoding."""


def save_mp4(path: str, video: Video, texts: Mapping[str, str], before_frame: Callable[[], None] = keep_going) -> None:
    """H.264 yuv420p, AAC when there is sound; texts as container tags. Raises for odd sizes, as x264 does."""
    rate = frame_rate(video.fps)
    with av.open(path, mode="w", format="mp4", options={"movflags": "use_metadata_tags"}) as container:
        for name, text in texts.items():
            container.metadata[name] = text
        stream = container.add_stream("h264", rate=rate)
        stream.height, stream.width = video.frames.shape[1], video.frames.shape[2]
        stream.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=video.audio.sample_rate_hz) if video.audio is not None else None
        _encode_frames(container, stream, video.frames, "yuv420p", before_frame)
        if sound is not None and video.audio is not None:
            samples = math.ceil(video.audio.sample_rate_hz / rate * len(video.frames))
            _encode_sound(container, sound, video.audio, samples, before_frame)


def save_webm(
    path: str,
    frames: Tensor,
    *,
    codec: str,
    fps: float,
    crf: float,
    texts: Mapping[str, str],
    before_frame: Callable[[], None] = keep_going,
) -> None:
    encoder, pixel_format = WEBM_CODECS[codec]
    options = {"crf": str(crf)} | ({"preset": "6"} if codec == "av1" else {})
    with av.open(path, mode="w", format="webm") as container:
        for name, text in texts.items():
            container.metadata[name] = text
        stream = container.add_stream(encoder, rate=frame_rate(fps))
        stream.height, stream.width = frames.shape[1], frames.shape[2]
        stream.pix_fmt = pixel_format
        stream.bit_rate = 0
        stream.options = options
        _encode_frames(container, stream, frames, pixel_format, before_frame)


def _encode_frames(
    container: av.container.OutputContainer,
    stream: av.VideoStream,
    frames: Tensor,
    form: str,
    before_frame: Callable[[], None],
) -> None:
    for frame in frames:
        before_frame()
        picture = av.VideoFrame.from_ndarray(to_bytes(frame[..., :3]), format="rgb24").reformat(format=form)
        container.mux(stream.encode(picture))
    container.mux(stream.encode(None))


def _encode_sound(
    container: av.container.OutputContainer,
    stream: av.AudioStream,
    audio: Audio,
    samples: int,
    before_block: Callable[[], None],
) -> None:
    """The first item of the batch, cut to the film's length."""
    waveform = audio.waveform[0, :, :samples].float().cpu()
    layout = "mono" if waveform.shape[0] == 1 else "stereo"
    for start in range(0, waveform.shape[1], audio.sample_rate_hz):
        before_block()
        block = waveform[:, start : start + audio.sample_rate_hz].t().reshape(1, -1).contiguous().numpy()
        frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
        frame.sample_rate, frame.pts = audio.sample_rate_hz, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
