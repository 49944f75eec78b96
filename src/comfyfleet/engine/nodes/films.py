"""Films: put together from pictures and sound, and saved. VIDEO is `engine.values.Video`."""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from comfyfleet.engine.media.film import WEBM_CODECS, save_mp4, save_webm
from comfyfleet.engine.media.pictures import metadata_texts
from comfyfleet.engine.registry import METADATA, NodeRegistry, NodeRun, Shown, choice, link, real, text
from comfyfleet.engine.values import Audio, Video

NODES = NodeRegistry()


@NODES.node(
    "CreateVideo",
    inputs={
        "images": link("IMAGE", tooltip="Its frames, in order."),
        "fps": real(30.0, 1.0, 120.0, step=1.0),
        "audio": link("AUDIO", required=False, tooltip="Its sound, if any."),
    },
    outputs=["VIDEO"],
    category="image/video",
    display_name="Create Video",
    description="Puts frames and sound together.",
)
def create_video(run: NodeRun, *, images: Tensor, fps: float, audio: Audio | None = None) -> tuple[Video]:
    return (Video(frames=images, fps=Fraction(fps), audio=audio),)


@NODES.node(
    "SaveVideo",
    inputs={
        "video": link("VIDEO", tooltip="The video to save."),
        "filename_prefix": text("video/ComfyUI"),
        "format": choice(["auto", "mp4"], default="auto"),
        "codec": choice(["auto", "h264"], default="auto"),
    },
    category="image/video",
    display_name="Save Video",
    description="Saves the video to the output folder.",
    is_output=True,
    hidden=METADATA,
)
def save_video(run: NodeRun, *, video: Video, filename_prefix: str, format: str, codec: str) -> Shown:
    height, width = video.frames.shape[1], video.frames.shape[2]
    name = run.folders.next_output(filename_prefix, "mp4", width=width, height=height)
    save_mp4(name.staging_path, video, metadata_texts(run.prompt, run.extra_pnginfo), run.check_stop)
    run.commit(name)
    return Shown(ui={"images": [name.shown()], "animated": [True]})


@NODES.node(
    "SaveWEBM",
    inputs={
        "images": link("IMAGE"),
        "filename_prefix": text("ComfyUI"),
        "codec": choice(list(WEBM_CODECS)),
        "fps": real(24.0, 0.01, 1000.0, step=0.01),
        "crf": real(32.0, 0, 63.0, step=1, tooltip="Higher is a smaller file of lower quality."),
    },
    category="image/video",
    is_output=True,
    hidden=METADATA,
)
def save_webm_file(run: NodeRun, *, images: Tensor, filename_prefix: str, codec: str, fps: float, crf: float) -> Shown:
    name = run.folders.next_output(filename_prefix, "webm", width=images.shape[2], height=images.shape[1])
    texts = metadata_texts(run.prompt, run.extra_pnginfo)
    save_webm(name.staging_path, images, codec=codec, fps=fps, crf=crf, texts=texts, before_frame=run.check_stop)
    run.commit(name)
    return Shown(ui={"images": [name.shown()], "animated": [True]})
