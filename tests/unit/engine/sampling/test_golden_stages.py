"""The documents' graphs, stage by stage: given the recorded prompts, each sampler node's latent equals the reference's.

Loaders and sampling nodes run here for real; prompts come from the records, so that a slip in a text encoder shows in
its own test and not here.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from comfyfleet.engine.models.open_file import open_diffusion, with_lora
from comfyfleet.engine.nodes.sampling import NODES
from comfyfleet.engine.values import ConditioningEntry, Latent

GOLDENS = Path(__file__).parents[3] / "goldens"
MODELS = GOLDENS / "models"
UMT5_ROWS = 512


def padded(text, rows):
    """Embeddings are recorded up to their last token; the rows after are zeros."""
    return torch.cat([text, text.new_zeros(1, rows - text.shape[1], text.shape[2])], dim=1)


class Graph:
    """A recorded graph, walked from its sampler nodes back to their models and latents."""

    def __init__(self, case):
        self.nodes = json.loads((GOLDENS / case / "graph.json").read_text())
        self.record = load_file(GOLDENS / case / "record.safetensors")
        self.sampled = {}

    def value(self, link):
        node = self.nodes[link[0]]
        kind, inputs = node["class_type"], node["inputs"]
        match kind:
            case "UNETLoader":
                return open_diffusion(str(MODELS / "diffusion_models" / inputs["unet_name"]), "cpu")
            case "CheckpointLoaderSimple":
                return open_diffusion(str(MODELS / "checkpoints" / inputs["ckpt_name"]), "cpu")
            case "LoraLoaderModelOnly":
                path = str(MODELS / "loras" / inputs["lora_name"])
                return with_lora(self.value(inputs["model"]), None, path, inputs["strength_model"], 0.0)[0]
            case "EmptyHunyuanLatentVideo" | "EmptyLatentImage":
                first = "sampler0" if "sampler0.latent_in" in self.record else "sampler"
                return Latent(samples=torch.zeros_like(self.record[f"{first}.latent_in"]))
            case "ModelSamplingSD3" | "KSampler" | "KSamplerAdvanced":
                return self.call(link[0])
        raise AssertionError(f"{kind} is not on the way to a latent")

    def call(self, name):
        """A sampling node's only output; kept, for a latent is asked for twice."""
        if name not in self.sampled:
            node = self.nodes[name]
            inputs = {key: self.given(key, value) for key, value in node["inputs"].items()}
            run = SimpleNamespace(progress=lambda value, maximum, preview=None: None)
            (self.sampled[name],) = NODES[node["class_type"]].function(run, **inputs)
        return self.sampled[name]

    def given(self, key, value):
        if key in ("positive", "negative"):
            text = self.record[f"text.{key}"]
            return (ConditioningEntry(embedding=padded(text, max(text.shape[1], self.rows))),)
        return self.value(value) if isinstance(value, list) else value

    @property
    def rows(self):
        return UMT5_ROWS if "UNETLoader" in {node["class_type"] for node in self.nodes.values()} else 0


@pytest.mark.parametrize("case", ["wan/t2v_16bit", "wan/t2v_fp8_scaled", "wan/t2v_lora"])
def test_both_experts_hand_over_as_in_the_reference(case):
    graph = Graph(case)

    for node, recorded in (("96", "latent.stage1"), ("95", "latent.stage2")):
        latent, expected = graph.call(node).samples, graph.record[recorded]
        assert float((latent - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("case", ["sd15/benchmark", "sd15/long_prompt_batch"])
def test_a_picture_s_latent_equals_the_reference(case):
    graph = Graph(case)

    latent, expected = graph.call("3").samples, graph.record["latent"]

    assert float((latent - expected).norm() / expected.norm()) < 1e-5
