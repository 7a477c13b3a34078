"""Write weights for another tool, and prove that it computes the same with them.

    maekit convert runs/c10 --to timm --out exported/

What was written is loaded by the tool itself, its outputs on a fixed input are compared with ours, and where they
differ by more than 1e-4 nothing stays on disk. A model that the target cannot express is refused by the reason.
Cost: seconds; a minute for ONNX. Computes in float32 on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.markup import escape
from safetensors.torch import save_file
from torch import Tensor, nn

from maekit.config import ConvertConfig, UserError
from maekit.models.classifier import Classifier
from maekit.models.encoder import use_fused_attention
from maekit.models.mae import MaskedAutoencoder
from maekit.terminal import make_console, remark
from maekit.weights.card import find_cards, model_card
from maekit.weights.export import has_decoder, hf_class, hf_config, obstacles, timm_config, to_hf, to_official, to_timm
from maekit.weights.readback import (
    Differences,
    fixed_images,
    read_hf,
    read_official,
    read_onnx,
    read_timm,
    read_torch_export,
)
from maekit.weights.store import load_any

Model: TypeAlias = MaskedAutoencoder | Classifier

TOLERANCE = 1e-4
"""Largest difference that is let pass: float32 products in another order differ by less."""
ONNX_INLINE_BYTES = 1 << 30
"""Larger weights go into a file of their own beside the graph: a protobuf holds at most 2 GB."""
EXTRAS = {"hf": ("transformers",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
"""Packages of maekit[export] that a target needs."""


class Graph(nn.Module):
    """Pixels in 0..1 to features, or to a classifier's logits: the normalisation is inside, so that nobody can get it
    wrong.

    It runs timm's own forward pass: the decoder stays behind, and so does our way of embedding some patches only.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, pool: str) -> None:
        super().__init__()
        self.encoder: Any = model.encoder
        self.num_prefix, self.pool = model.num_prefix, pool
        self.head: nn.Module = nn.Identity()
        if isinstance(model, Classifier):
            self.head = nn.Sequential(model.fc_norm, model.head)
        self.register_buffer("mean", model.mean.clone())
        self.register_buffer("std", model.std.clone())

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.encoder.forward_features((images - self.mean) / self.std)
        if self.pool != "tokens":
            tokens = tokens[:, 0] if self.pool == "cls" else tokens[:, self.num_prefix :].mean(dim=1)
        found: Tensor = self.head(tokens)
        return found


def main(source: str, config: ConvertConfig) -> int:
    """Write, read back, compare, and only then give the folder its name.

    Raises:
        UserError: the folder is taken, the target cannot express the model or needs packages, or outputs differ.
    """
    console = make_console()
    out = Path(config.out)
    check_out(out, config)
    model = load_any(source, config)
    remark(console, model.key_report.remarks())
    with_decoder = not config.encoder_only and has_decoder(model)
    pool = model.pool if isinstance(model, Classifier) else config.pool
    problems = obstacles(model, config.to, with_decoder)
    if pool == "cls" and not model.encoder.has_class_token:
        problems.append("--pool cls: this encoder has no class token; take --pool mean")
    if problems:
        raise UserError(*problems)

    temporary = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with warnings.catch_warnings():  # of other libraries, about themselves
            warnings.simplefilter("ignore")
            if config.to == "timm":
                usage = write_timm(temporary, out, model, pool)
                found = read_timm(temporary, model, pool)
            elif config.to == "hf":
                usage = write_hf(temporary, out, model, with_decoder)
                found = read_hf(temporary, model, with_decoder)
            elif config.to == "official":
                file, usage = write_official(temporary, out, model, with_decoder)
                found = read_official(file, model)
            elif config.to == "onnx":
                usage = write_onnx(temporary, out, model, pool)
                found = read_onnx(temporary / "model.onnx", model, pool)
            else:
                usage = write_torch_export(temporary, out, model, pool)
                found = read_torch_export(temporary / "model.pt2", model, pool)
        judge(found, config)
        cards = find_cards(Path(source)) if Path(source).is_dir() else {}
        # Where the folder lies now is nobody else's business.
        card = model_card(out.name, model.passport, usage.replace(str(out), out.name), cards, LIBRARY[config.to])
        (temporary / "README.md").write_text(card)
        os.replace(temporary, out)  # an empty folder of that name is replaced
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    files = ", ".join(sorted(path.name for path in out.iterdir()))
    console.print(f"written: {escape(str(out))} ({files})", soft_wrap=True)
    for name, difference in found.items():
        console.print(f"same {name}: largest difference {difference:.1e}")
    if isinstance(model, Classifier):
        console.print(f"the classifier of {len(model.classes)} classes; --encoder-only writes the encoder alone")
    elif config.to in ("hf", "official") and not with_decoder:
        kind = (
            "ViTModel; load it with add_pooling_layer=False" if config.to == "hf" else "the names of released encoders"
        )
        console.print(f"the encoder alone: {kind}")
    console.print(f"licence of the weights: {escape(model.passport.weights_license)}", soft_wrap=True)
    console.print(f"\n[dim]{escape(usage)}[/dim]", soft_wrap=True)
    return 0


LIBRARY = {"timm": "timm", "hf": "transformers", "official": "", "onnx": "onnx", "torch-export": "pytorch"}


def check_out(out: Path, config: ConvertConfig) -> None:
    """Refuse a folder that holds something, and a target whose packages are missing."""
    problems = []
    if out.exists() and not out.is_dir():
        problems.append(f"--out {config.out}: is a file; name a folder")
    elif out.is_dir() and any(out.iterdir()):
        problems.append(f"--out {config.out}: holds something already; name a new folder")
    missing = [name for name in EXTRAS.get(config.to, ()) if find_spec(name) is None]
    if missing:
        problems.append(f"--to {config.to} needs {', '.join(missing)}: pip install 'maekit[export]'")
    if problems:
        raise UserError(*problems)


def judge(found: Differences, config: ConvertConfig) -> None:
    """Refuse weights that compute something else where they arrived."""
    wrong = [
        f"--to {config.to}: {name} differ by {difference:.1e}, more than {TOLERANCE:g}; nothing was kept"
        for name, difference in found.items()
        if not difference <= TOLERANCE
    ]
    if wrong:
        raise UserError(*wrong)


def header(model: Model) -> dict[str, str]:
    """What a safetensors or ONNX file says about its origin; `format` is what transformers asks for."""
    passport = model.passport
    return {
        "format": "pt",
        "license": passport.weights_license,
        "made_by": f"maekit {version('maekit')}",
        "mean": json.dumps(passport.mean),
        "std": json.dumps(passport.std),
        **({"classes": json.dumps(passport.classes)} if passport.classes else {}),
    }


def save_weights(state: dict[str, Tensor], folder: Path, model: Model) -> None:
    """model.safetensors, readable for everybody who may read the folder."""
    save_file(own(state), folder / "model.safetensors", metadata=header(model))
    (folder / "model.safetensors").chmod(0o644)


def write_timm(folder: Path, out: Path, model: Model, pool: str) -> str:
    """config.json and model.safetensors, as timm's own `local-dir:` and `hf-hub:` read them."""
    config = timm_config(model.passport, pool)
    config["pretrained_cfg"]["license"] = model.passport.weights_license
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = to_timm(model.state_dict())
    save_weights(state, folder, model)
    return (
        f'import timm\n\nmodel = timm.create_model("local-dir:{out}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "# of a picture of 8 bits opened with Pillow: model(transform(picture).unsqueeze(0))"
    )


def write_hf(folder: Path, out: Path, model: Model, with_decoder: bool) -> str:
    """config.json, preprocessor_config.json and model.safetensors, as `from_pretrained` reads them."""
    from transformers import ViTConfig, ViTImageProcessor, ViTMAEConfig

    kind = ViTMAEConfig if with_decoder else ViTConfig
    encoder: Any = model.encoder
    fields = hf_config(model.config, encoder.norm.eps, with_decoder)
    name = hf_class(model, with_decoder)
    if isinstance(model, Classifier):
        fields["id2label"] = dict(enumerate(model.classes))
        fields["label2id"] = {label: index for index, label in enumerate(model.classes)}
    kind(**fields, architectures=[name]).save_pretrained(folder)
    height, width = model.config.size_hw
    ViTImageProcessor(
        # The centre, as `encode` is given it: no aspect is changed.
        size={"shortest_edge": int(min(height, width) / model.passport.crop_pct)},
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        resample={"bilinear": 2, "bicubic": 3}[model.passport.interpolation],  # Pillow's numbers
        image_mean=list(model.passport.mean),
        image_std=list(model.passport.std),
    ).save_pretrained(folder)
    save_weights(to_hf(chosen(model, with_decoder), model.config), folder, model)
    more = ", add_pooling_layer=False" if name == "ViTModel" else ""
    return (
        f"from transformers import ViTImageProcessor, {name}\n\n"
        f'processor = ViTImageProcessor.from_pretrained("{out}")\n'
        f'model = {name}.from_pretrained("{out}"{more})'
    )


def write_official(folder: Path, out: Path, model: Model, with_decoder: bool) -> tuple[Path, str]:
    """One .pth with tensors and nothing else, named as the released ones."""
    name = "mae_pretrain_full.pth" if with_decoder else "mae_pretrain.pth"
    if isinstance(model, Classifier):
        name = "mae_finetuned.pth"
    torch.save({"model": own(to_official(chosen(model, with_decoder), model.config))}, folder / name)
    return folder / name, f'import torch\n\nstate = torch.load("{out / name}", weights_only=True)["model"]'


def write_onnx(folder: Path, out: Path, model: Model, pool: str) -> str:
    """model.onnx: `images` (pixels in 0..1, any batch size) to `features`, or to a classifier's `logits`."""
    import onnx

    answer = "logits" if isinstance(model, Classifier) else "features"
    program = traced(model, pool)
    path = folder / "model.onnx"
    large = sum(value.nbytes for value in model.state_dict().values()) > ONNX_INLINE_BYTES
    exported: Any = torch.onnx.export(
        program, input_names=["images"], output_names=[answer], dynamo=True, verbose=False
    )
    for key, value in (header(model) | told(pool)).items():
        if key != "format":
            exported.model.metadata_props[key] = value
    exported.save(path, external_data=large)
    onnx.checker.check_model(path)
    return (
        f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{out / path.name}")\n'
        "# pixels: float32 [batch, channel, row, column] in 0..1\n"
        f'{answer} = session.run(["{answer}"], {{"images": pixels}})[0]'
    )


def write_torch_export(folder: Path, out: Path, model: Model, pool: str) -> str:
    """model.pt2: the graph and the weights, which torch loads without any of our code."""
    extra = {"maekit.json": json.dumps(header(model) | told(pool))}
    torch.export.save(traced(model, pool), folder / "model.pt2", extra_files=extra)
    return (
        f'import torch\n\nmodel = torch.export.load("{out / "model.pt2"}").module()\n'
        "# pixels: float32 [batch, channel, row, column] in 0..1\n"
        f"{'logits' if isinstance(model, Classifier) else 'features'} = model(pixels)"
    )


def traced(model: Model, pool: str) -> Any:
    """The encoder as a graph for any batch size."""
    use_fused_attention(model, fused=True)
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(
        Graph(model, pool).eval(), (fixed_images(model),), dynamic_shapes={"images": {0: batch}}, strict=False
    )


def told(pool: str) -> dict[str, str]:
    """What a graph is given and gives."""
    return {"input": "pixels in 0..1", "pool": pool}


def chosen(model: Model, with_decoder: bool) -> dict[str, Tensor]:
    """The tensors that are written: those of a decoder only where it was trained."""
    kept = model.state_dict()
    return {name: value for name, value in kept.items() if with_decoder or not name.startswith("decoder.")}


def own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory with others: what is saved is what is named."""
    return {name: value.detach().clone().contiguous() for name, value in state.items()}
