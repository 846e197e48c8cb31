"""Cost: what is counted by running a model is what the formulas say, and what the paper's equations give."""

from __future__ import annotations

import json
from math import prod

import peft
import pytest
import torch
import towers
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from inti_kernels import FusedInTI, InTI, compress, ops
from inti_kernels.__main__ import main
from inti_kernels.cli import _clip, _published
from inti_kernels.cli import cost as command
from inti_kernels.models import adapter_for, cost
from inti_kernels.models.cost import Tower, Work, by_formula, count_macs, total
from inti_kernels.models.methods import choices
from inti_kernels.models.temporal import UniFormerV2
from inti_kernels.ops import _flops  # noqa: F401  (registers the ops)
from inti_kernels.reference.inti import FUSIONS, HEADS, LEVELS

META = torch.device("meta")
VIT_B = Tower(768, 12, (16, 16), (14, 14), features=0)
VIT_L = Tower(1024, 24, (14, 14), (16, 16), features=0)
# With the prefix tokens that they are tried with.
CONTEXTS = {(): 0, ("cube",): 5, ("frame",): 0, ("global",): 1, ("frame", "global"): 5, LEVELS: 1}


pytestmark = pytest.mark.usefixtures("one_thread")


def macs_of(run) -> int:
    """Of a call on tensors without data."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def meta(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, device=META, requires_grad=grad)


# The module and its ops under torch's counter


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(("context", "prefix"), CONTEXTS.items(), ids=str)
def test_an_inti_counts_the_same_by_both_ways_and_by_formula(context, prefix, fusion) -> None:
    for head in HEADS:
        if head == "attention" and fusion == "add" and context:
            continue  # has no such module
        options = {"prefix": prefix, "context": context, "fusion": fusion, "head": head, "hidden": 12}
        with META:
            inti = InTI(8, 6, (2, 3), **options)
            fused = FusedInTI(8, 6, (2, 3), **options, backend="cpu")  # which can't run here, and needn't
        tokens = meta(1, 6, prefix + 6, 8)
        formula = cost.inti(inti, 6, prefix + 6)
        assert count_macs(inti, tokens) == count_macs(fused, tokens) == formula.macs
        assert sum(parameter.numel() for parameter in inti.parameters()) == formula.parameters


OPS = {
    # Each op with what it needs, the multiply-accumulates of its products, and for each input how many of the two
    # gradient products (of a product's input, of its weight) its gradient takes.
    "token_features": (
        lambda x, nw, nb, w, b: ops.token_features(x, nw, nb, w, b, backend="cpu"),
        ((2, 4, 7, 6), (6,), (6,), (3, 6), (3,)),
        2 * 4 * 7 * 6 * 3,
        (1, 1, 1, 1, 0),
    ),
    "depthwise_conv3d": (
        lambda x, w, b: ops.depthwise_conv3d(x, w, b, (2, 3), backend="cpu"),
        ((2, 4, 7, 6), (6, 1, 3, 3, 3), (6,)),
        2 * 2 * 6 * 6 * 27,
        (1, 1, 0),
    ),
    "frames_conv3d": (
        lambda x, w, b: ops.depthwise_conv3d(x, w, b, (2, 3), temporal_stride=1, prefix=1, backend="cpu"),
        ((2, 4, 7, 6), (6, 1, 3, 1, 1), (6,)),
        2 * 4 * 6 * 6 * 3,
        (1, 1, 0),
    ),
}


def of_gradients(run, shapes: tuple[tuple[int, ...], ...], needed: set[int]) -> int:
    """What the gradients of some of the inputs cost, beside the forward."""
    inputs = [meta(*shape, grad=number in needed) for number, shape in enumerate(shapes)]

    def step() -> None:
        output = run(*inputs)
        output.backward(torch.empty_like(output))

    return macs_of(step) - macs_of(lambda: run(*inputs))


@pytest.mark.parametrize("name", OPS)
def test_an_op_and_each_of_its_gradients(name) -> None:
    run, shapes, macs, products = OPS[name]
    assert macs_of(lambda: run(*(meta(*shape) for shape in shapes))) == macs
    for number, of_this in enumerate(products):
        assert of_gradients(run, shapes, {number}) == of_this * macs
    assert of_gradients(run, shapes, set(range(len(shapes)))) == 2 * macs


def test_the_head_and_each_of_its_gradients() -> None:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        return ops.interpolation_head(*inputs, backend="cpu")[0]

    shapes = ((2, 2, 7, 6), (2, 2, 7, 6), (2, 2, 6), (2, 4, 7, 6), (5, 12), (5,), (2, 5), (2,))
    first, second = 28 * 12 * 5, 28 * 5 * 2
    assert macs_of(lambda: run(*(meta(*shape) for shape in shapes))) == first + second
    for number, expected in enumerate([first + second] * 3 + [0, first + second, second, second, 0]):
        assert of_gradients(run, shapes, {number}) == expected
    assert of_gradients(run, shapes, set(range(8))) == 2 * (first + second)


def test_interpolation_alone_is_element_wise() -> None:
    assert macs_of(lambda: ops.pair_interpolate(meta(1, 4, 3, 8), meta(1, 2, 3, 2), backend="cpu")) == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_the_backward_of_a_module_is_twice_its_forward(recompute) -> None:
    """And three times where it does the forward's products again, as the frame and the global level always do."""
    shape = (1, 4, 7, 8)
    with META:
        module = FusedInTI(8, 4, (2, 3), recompute=recompute)
    whole = cost.inti(module, 4, 7).macs
    few = whole - cost.inti(InTI(8, 4, (2, 3), context=("cube",)), 4, 7).macs
    again = whole if recompute else few
    assert of_gradients(module, (shape,), {0}) == 2 * whole + again
    module.requires_grad_(False)
    # One product each without the weights', but for the class tokens' few, whose gradients come together.
    assert of_gradients(module, (shape,), {0}) == whole + few + again


def test_attention_is_two_products() -> None:
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v)

    assert count_macs(Attention(), meta(2, 3, 5, 8), meta(2, 3, 7, 8), meta(2, 3, 7, 8)) == 2 * (2 * 3 * 5 * 7 * 8)


# Whole models

METHODS = {
    "naive": {},
    "inti": {"after": (1, 2), "inti": {"context": ("cube",), "fusion": "cat", "hidden": 10}},
    "inti_reference": {"after": (3,)},
    "linear_pooling": {"after": (1, 4)},
    "conv_pooling": {"after": (2,), "conv_pooling": {"groups": 4}},
    "tome": {"tome": {"r": 3}},
    "sta": {"sta": {"keep": 0.6, "at": (2, 3)}},
}
TEMPORAL = {
    "none": {},
    "global": {"temporal": "uniformer_v2", "uniformer_v2": {"global_blocks": 3, "mlp_ratio": 3}},
    "double": {"temporal": "uniformer_v2", "uniformer_v2": {"global_blocks": 1, "local": "double"}},
    "local": {"temporal": "uniformer_v2", "uniformer_v2": {"global_blocks": 0, "local": True}},
    "adapter": {"temporal": "st_adapter", "st_adapter": {"width": 10, "before": "mlp"}},
}


# DiffAttention has four products, and SigLIP 2 fits its positions to every picture's size.
OTHER_WORK = {"timm-diff", "siglip2"}


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    with META:
        return _clip.build_tower("vit_tiny")


@pytest.mark.parametrize("temporal", TEMPORAL)
@pytest.mark.parametrize("method", METHODS)
def test_formula_and_count_agree(tiny, method, temporal) -> None:
    # A classifier on the tower's features and on those of temporal modules, and none.
    classes = None if temporal in ("none", "double") else 7
    arguments = {"num_classes": classes, **METHODS[method], **TEMPORAL[temporal]}
    found = command.price(tiny, 8, method=method, **arguments)
    formula = found["parts"]["total"]
    assert (found["macs"], found["parameters"]) == (formula["macs"], formula["parameters"])
    assert found["agree"]


@pytest.mark.parametrize("kind", sorted(towers.KINDS.keys() - OTHER_WORK))
def test_multiply_accumulates_of_every_library(kind) -> None:
    """Heads, MLPs and norms of all kinds, really run; parameters by formula are CLIP's alone."""
    adapter = adapter_for(towers.build(kind))
    models = [compress(adapter.model, 4, (1, 3), num_classes=5)]
    if adapter.other_form is None and adapter.pools_class_token:
        models.append(compress(adapter.model, 4, method="tome", tome={"r": 2}))
    for model in models:
        video = torch.randn(1, 4, 3, *adapter.image)
        # Torch's counter knows no fused attention on the CPU; nor nn.MultiheadAttention's, which takes no gradients.
        with sdpa_kernel(SDPBackend.MATH):
            counted = macs_of(lambda: model(video))  # noqa: B023
        assert total(by_formula(model)).macs == counted


def test_pictures_that_a_tower_pads() -> None:
    """timm's dynamic_img_pad: what is left of a picture behind the last whole patch is a patch too."""
    sizes = {"img_size": (60, 24), "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
    tower = VisionTransformer(**sizes, dynamic_img_size=True, dynamic_img_pad=True)
    model, video = compress(tower, 4, (1, 3)), torch.randn(1, 4, 3, 60, 24)
    assert model.embed(video).shape[2] == 1 + 4 * 2
    counted = count_macs(model, video)
    assert total(by_formula(model)).macs == counted
    least = counted / 1e9
    for gflops in (least, 1.1 * least):
        assert count_macs(compress(tower, 4, gflops=gflops), video) <= gflops * 1e9


# The paper's figures


def insertions(tower: Tower, after: tuple[int, ...], **options) -> dict[int, InTI]:
    with META:
        return {block: InTI(tower.dim, 16 >> level, tower.grid, **options) for level, block in enumerate(after)}


@pytest.mark.parametrize(
    ("tower", "after", "naive", "alone", "linear", "whole"),
    [(VIT_B, (5, 7), 281.0, 170.5, 174.69, 174.76), (VIT_L, (10, 14), 1296.2, 784.1, 793.79, 793.91)],
    ids=["B", "L"],
)
def test_what_the_equations_give(tower, after, naive, alone, linear, whole) -> None:
    assert total(cost.formula(tower, 16)).macs / 1e9 == pytest.approx(naive, abs=0.05)
    parts = cost.formula(tower, 16, insertions(tower, after))
    backbone = total(parts).macs - parts["compression"].macs
    assert backbone / 1e9 == pytest.approx(alone, abs=0.05)
    assert total(parts).macs / 1e9 == pytest.approx(whole, abs=0.01)
    # The linear layers of every token pair: neither a convolution nor the frame level.
    without = total(cost.formula(tower, 16, insertions(tower, after, context=("global",)))).macs
    assert without / 1e9 == pytest.approx(linear, abs=0.01)
    assert (backbone + 3 * tower.dim**2 * 12 * tower.tokens) / 1e9 == pytest.approx(linear, abs=0.005)


@pytest.mark.parametrize(("tower", "features"), [(VIT_B, 512), (VIT_L, 768)], ids=["B", "L"])
def test_the_projection_does_not_show_in_the_published_figures(tower, features) -> None:
    for size in (0, features):
        with_head = Tower(tower.dim, tower.blocks, tower.patch, tower.grid, size)
        naive = total(cost.formula(with_head, 16)).macs / 1e9
        assert round(naive, 1) == {768: 281.0, 1024: 1296.2}[tower.dim]


PARAMETERS = [
    ({"context": ()}, 116.3), ({"context": ("cube",)}, 117.6), ({"context": ("frame",)}, 119.3),
    ({"context": ("global",)}, 117.5), ({"context": ("cube", "frame")}, 119.3),
    ({"context": ("frame", "global")}, 119.3), ({}, 119.4), ({"fusion": "add"}, 118.2), ({"fusion": "cat"}, 121.7),
]  # fmt: skip


@pytest.mark.parametrize(("options", "millions"), PARAMETERS, ids=str)
def test_parameters_of_the_ablations(options, millions) -> None:
    with META:
        uniformer = UniFormerV2(768, 12, (14, 14))
    modules = insertions(VIT_B, (5, 7), **options)
    parameters = total(cost.formula(VIT_B, 16, modules, None, uniformer, (768, 400))).parameters
    assert parameters / 1e6 == pytest.approx(millions, abs=0.0501)
    own = sum(parameter.numel() for module in modules.values() for parameter in module.parameters())
    assert parameters == 114_552_208 + own


def test_rows_of_the_papers_tables(monkeypatch) -> None:
    """Counted by running; the command itself runs all of them."""
    rows = {row.name: row for row in _published.rows()}
    names = ("Naive-B", "InTI-B 5,7", "UniFormerV2-B", "STA^temp-B")
    found = {row["name"]: row for row in command.paper([rows[name] for name in names])}
    assert rows["UniFormerV2-B"].table == _published.SOMETHING  # the later of two of this name
    assert all(row["agree"] for row in found.values())
    assert found["Naive-B"]["macs"] / 1e9 == pytest.approx(281.0, abs=0.05)
    assert found["InTI-B 5,7"]["macs"] / 1e9 == pytest.approx(174.76, abs=0.01)
    assert found["UniFormerV2-B"]["macs"] / 1e9 == pytest.approx(371, abs=0.5)
    assert rows["STA^temp-B"].table == _published.SOMETHING
    assert 250 < found["STA^temp-B"]["macs"] / 1e9 <= 254


# Settings for a budget


@pytest.mark.parametrize(
    ("method", "temporal"),
    [
        ("inti", "uniformer_v2"),
        ("linear_pooling", None),
        ("conv_pooling", None),
        ("tome", "uniformer_v2"),
        ("sta", None),
    ],
)
def test_the_costliest_setting_within_a_budget(tiny, method, temporal) -> None:
    arguments = {"frames": 8, "method": method, "temporal": temporal, "num_classes": 3}
    naive = command.price(tiny, **(arguments | {"method": "naive"}))["macs"]
    tower, found_by_hand = Tower.of(adapter_for(tiny)), []
    for choice in choices(method, tower.blocks, tower.tokens, tower.prefix):
        after = choice.get("after", ())
        own = {} if after else {method: choice}
        with META:
            model = compress(tiny, **arguments, after=after, **own)
        found_by_hand.append((total(by_formula(model)).macs, list(after), own.get(method, {})))
    found = command.price(tiny, **arguments, gflops=0.8 * naive / 1e9)
    within = max(macs for macs, *_ in found_by_hand if macs <= 0.8 * naive)
    assert found["macs"] == within
    assert (within, found["settings"]["after"], found["settings"].get(method, {})) in found_by_hand
    # To the multiply-accumulate.
    assert command.price(tiny, **arguments, gflops=within / 1e9)["macs"] == within
    if cheaper := [macs for macs, *_ in found_by_hand if macs < within]:
        assert command.price(tiny, **arguments, gflops=(within - 1) / 1e9)["macs"] == max(cheaper)
    else:
        with pytest.raises(ValueError, match="the least is"):
            command.price(tiny, **arguments, gflops=(within - 1) / 1e9)


@pytest.mark.parametrize("name", ["open_clip", "openai_clip"])
def test_a_budget_with_lora_on_the_attention(name) -> None:
    """Keys can't be read there, and what stands between the blocks doesn't need them."""
    tower = towers.build(name)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["attn"], r=2), tower)
    naive = total(by_formula(compress(tower, 4, method="naive"))).macs / 1e9
    assert compress(tower, 4, gflops=0.9 * naive).settings["after"]
    with pytest.raises(ValueError, match="its queries and keys can't be read"):
        compress(tower, 4, method="tome", gflops=0.9 * naive)


@pytest.mark.parametrize("name", ["open_clip", "clip", "timm"])
def test_a_budget_of_a_tower_in_half_precision(name) -> None:
    naive = total(by_formula(compress(towers.build(name), 4, method="naive"))).macs / 1e9
    single, half = (
        compress(towers.build(name).to(dtype), 4, method="sta", gflops=0.9 * naive)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert single.reduction.keep < 1
    assert half.settings == single.settings
    assert total(by_formula(half)) == total(by_formula(single))


@pytest.mark.parametrize("method", ["naive", "inti", "tome"])
def test_a_budget_out_of_reach_says_the_least(tiny, method) -> None:
    with META, pytest.raises(ValueError, match=rf"gflops=0.001 can't be reached by {method} .*: the least is 0\.0\d+"):
        compress(tiny, 8, method=method, gflops=0.001)


def test_a_budget_and_its_setting_are_one_too_many(tiny) -> None:
    with META, pytest.raises(TypeError, match="gflops= sets r of tome"):
        compress(tiny, 8, method="tome", gflops=1, tome={"r": 2})


# The command


def test_one_model(capsys) -> None:
    arguments = ["--model", "vit_tiny", "--after", "1,2", "--frames", "8", "--classes", "3", "--json", "-"]
    assert main(["cost", *arguments, "--options", '{"inti": {"fusion": "add"}}']) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["agree"]
    assert row["settings"]["after"] == [1, 2]
    assert row["parts"]["total"]["macs"] == row["macs"]
    # Patches are 16×16 pixels of 3 colours; 4×4 of them a frame.
    assert row["parts"]["embed"]["macs"] == 8 * prod((4, 4, 16, 16, 3, 32))
    assert row["parts"]["head"] == {"macs": 2 * 32 * 16 + 16 * 3, "parameters": 2 * 32 + 32 * 16 + 17 * 3}
    assert main(["cost", *arguments[:-2]]) == 0
    out = capsys.readouterr().out
    assert f"{row['macs'] / 1e9:.2f}" in out
    assert "counted by running" in out


def test_a_disagreement_is_a_failure(capsys, monkeypatch) -> None:
    monkeypatch.setattr(command, "count_macs", lambda *args: count_macs(*args) + 1)
    assert main(["cost", "--model", "vit_tiny", "--after", "1"]) == 1
    assert "FAIL: vit_tiny, inti" in capsys.readouterr().err
    assert main(["cost", "--model", "vit_tiny", "--json", "-"]) == 1
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["rows"][0]["agree"]
    assert "FAIL: vit_tiny, inti" in captured.err


def test_a_file_gets_what_is_printed_and_is_not_overwritten(tmp_path, capsys) -> None:
    path = tmp_path / "cost.json"
    arguments = ["cost", "--model", "vit_tiny", "--method", "naive", "--json", str(path)]
    assert main(arguments) == 0
    assert json.loads(path.read_text())["rows"][0]["agree"]
    assert main(arguments) == 1
    assert "is not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--after", "5,7"], "from 1 to 4"),
        (["--method", "tome", "--gflops", "0.0001"], "the least is"),
        (["--after", "1", "--options", '{"tome": {}}'], "unknown option 'tome'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said(arguments, message, capsys) -> None:
    assert main(["cost", "--model", "vit_tiny", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_work_adds_up() -> None:
    assert Work(1, 2) + Work(3, 4) * 2 == Work(7, 10)
