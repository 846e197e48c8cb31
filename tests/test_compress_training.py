"""What compressed towers have to work with: training, autocast, checkpointing, compilers, exporters, adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import onnxruntime
import peft
import pytest
import torch
import towers
from torch import Tensor

from inti_kernels import compress
from inti_kernels.models import methods

pytestmark = pytest.mark.usefixtures("one_thread")

LIBRARIES = towers.LIBRARIES
METHODS = ("naive", *methods.METHODS)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(name: str, method: str) -> None:
    """Every parameter in use has a gradient, the tower's too, and the new ones are where the tower's are."""
    model = towers.randomized(towers.compressed(name, method, num_classes=7)).train()
    scores = model(towers.clips(name))
    assert scores.shape == (2, 7)
    scores.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    backbone = [p.grad.abs().max() for p in model.blocks[0].parameters()]
    assert max(backbone) > 0


@pytest.mark.parametrize(
    ("temporal", "options"),
    [
        ("uniformer_v2", {"global_blocks": 2, "dropout": 0.0}),
        ("uniformer_v2", {"global_blocks": 1, "dropout": 0.0, "local": "double"}),
        ("st_adapter", {"width": 8}),
        ("st_adapter", {"width": 8, "before": "mlp"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_temporal_modules(method: str, temporal: str, options: dict) -> None:
    model = towers.randomized(
        towers.compressed("open_clip", method, temporal=temporal, num_classes=3, **{temporal: options})
    )
    model.train()(towers.clips("open_clip")).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    # Behind the last attention the class token no longer sees the patches, which an adapter works on.
    unseen = f"adapters.{towers.BLOCKS - 1}." if options.get("before") == "mlp" else "none"
    for key, parameter in model.temporal.named_parameters():
        assert parameter.grad.any() != key.startswith(unseen), key


@pytest.mark.parametrize("name", [name for name, kind in towers.KINDS.items() if kind.checkpointing])
def test_the_librarys_gradient_checkpointing(name: str) -> None:
    """The same gradients, and less kept for the backward."""
    kept, gradients = [], []
    for on in (False, True):
        tower = towers.build(name)
        towers.KINDS[name].checkpointing(tower, on)
        model = towers.randomized(compress(tower, towers.FRAMES, towers.AFTER, "inti_reference")).train()
        for module in model.modules():  # paths and patches that are dropped would be others in every run
            if hasattr(module, "drop_prob") or hasattr(module, "prob"):
                module.eval()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(_counting(sizes), lambda tensor: tensor):
            loss = model(towers.clips(name, 1)).square().mean()
        loss.backward()
        kept.append(sum(sizes))
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert kept[1] < 0.7 * kept[0]
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def _counting(sizes: list[int]) -> Callable[[Tensor], Tensor]:
    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    return keep


@pytest.mark.parametrize("name", ["open_clip-tokens", "timm-dynamic"])
def test_towers_that_drop_patches_are_refused_in_training(name: str) -> None:
    with pytest.raises(ValueError, match="drops patches in training"):
        towers.compressed(name).train()(towers.clips(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LIBRARIES)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    model, clips = towers.randomized(towers.compressed(name)), towers.clips(name)
    with torch.autocast("cpu", dtype):
        output = model(clips)
        output.float().square().mean().backward()
    error = (output.float() - model(clips)).square().mean().sqrt()
    assert error < {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype] * output.float().square().mean().sqrt()


@pytest.mark.parametrize("name", LIBRARIES)
def test_compile_breaks_no_graph(name: str) -> None:
    temporal = {"temporal": "uniformer_v2", "uniformer_v2": {"global_blocks": 1, "local": "double", "dropout": 0.0}}
    model, clips = towers.randomized(towers.compressed(name, **temporal if name == "timm" else {})), towers.clips(name)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(clips), model(clips))
    step(clips).square().mean().backward()
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "method"), [*((name, "inti") for name in LIBRARIES), ("timm", "tome")])
def test_export(name: str, method: str) -> None:
    model, clips = towers.randomized(towers.compressed(name, method)), towers.clips(name)
    exported = torch.export.export(model, (clips,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(clips), model(clips))


@pytest.mark.parametrize("name", LIBRARIES)
def test_onnx(name: str) -> None:
    """Through the reference, whose operators ONNX knows."""
    model, clips = towers.randomized(towers.compressed(name, "inti_reference", num_classes=3)), towers.clips(name)
    program = torch.onnx.export(model, (clips,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (scores,) = session.run(None, {session.get_inputs()[0].name: clips.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(scores), model(clips), rtol=1e-3, atol=1e-4)


LORA = {"open_clip": ["c_fc"], "openai_clip": ["c_fc"], "clip": ["q_proj", "v_proj"], "timm": ["qkv"]}


@pytest.mark.parametrize("name", LIBRARIES)
def test_lora_on_the_backbone(name: str) -> None:
    """Put on before or after: its branches are called, and trained while the tower isn't."""
    config = peft.LoraConfig(r=2, target_modules=LORA[name], init_lora_weights=False)
    model = towers.randomized(towers.compressed(name))
    clips, plain = towers.clips(name), model(towers.clips(name))
    model.freeze(model.backbone.parameters())
    peft.inject_adapter_in_model(config, model.backbone)
    model(clips).square().mean().backward()
    assert not torch.allclose(model(clips), plain)
    trained = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {key for key, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in key for key in trained)
    assert all("lora_" in key for key in trained if key.startswith("backbone"))
    before = compress(peft.inject_adapter_in_model(config, towers.build(name)), towers.FRAMES, towers.AFTER)
    before.load_state_dict(model.state_dict())
    torch.testing.assert_close(before(clips), model(clips))


@pytest.mark.parametrize("options", [{"method": "tome"}, {"temporal": "st_adapter", "st_adapter": {"before": "mlp"}}])
def test_blocks_that_cant_be_taken_apart(options: dict) -> None:
    """Refused when the model is made, by name; and a block that FSDP2 sharded by itself when it is run."""
    with pytest.raises(ValueError, match="ParallelScalingBlock can't be taken apart"):
        compress(
            towers.build("timm-parallel"),
            towers.FRAMES,
            **{"after": () if "method" in options else towers.AFTER, **options},
        )
    model = towers.compressed("timm", **options)
    handle = model.blocks[2].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="takes block 3 apart, but it has hooks"):
        model(towers.clips("timm"))
    handle.remove()
    model.blocks[1].unshard = None
    with pytest.raises(RuntimeError, match="takes block 2 apart, but FSDP2 sharded it"):
        model(towers.clips("timm"))


def test_frozen_backbone() -> None:
    tower = towers.build("clip")
    model = towers.randomized(compress(tower, towers.FRAMES, towers.AFTER, freeze_backbone=True, num_classes=2))
    model(towers.clips("clip")).square().mean().backward()
    assert all(p.grad is None for p in tower.parameters())
    assert all(p.grad is not None for p in model.insertions.parameters())
    assert compress(tower, **model.settings).settings == model.settings
    model.uncompress()
    assert all(p.requires_grad for p in tower.parameters())


def test_a_copy_is_whole() -> None:
    """deepcopy, as EMA makes one: it runs on its own tower."""
    model = towers.randomized(towers.compressed("open_clip"))
    twin, clips = copy.deepcopy(model), towers.clips("open_clip")
    expected = model(clips)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(clips), expected)
    assert not torch.equal(model(clips), expected)


@pytest.mark.parametrize("name", ["open_clip", "openai_clip"])
def test_towers_in_half_precision(name: str) -> None:
    """As these libraries load them on a GPU: matrices in half precision, norms and class token in single."""
    tower = towers.convert_weights(towers.build(name))
    assert {p.dtype for p in tower.parameters()} == {torch.float16, torch.float32}
    model = towers.randomized(compress(tower, towers.FRAMES, towers.AFTER, num_classes=2, inti={"hidden": 8}))
    assert {p.dtype for p in model.insertions.parameters()} == {torch.float16}
    scores = model(towers.clips(name).half())
    wide = towers.randomized(
        compress(towers.build(name), towers.FRAMES, towers.AFTER, num_classes=2, inti={"hidden": 8})
    )
    torch.testing.assert_close(scores.float(), wide(towers.clips(name)), rtol=0.05, atol=0.05)
    scores.float().square().mean().backward()


def test_another_dtype() -> None:
    model = compress(towers.build("timm").double(), towers.FRAMES, towers.AFTER, num_classes=2)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(towers.clips("timm").double()).dtype == torch.float64


@pytest.mark.parametrize("local", [True, "double"])
@pytest.mark.parametrize("method", ["inti", "tome", "sta"])
def test_batch_statistics_are_taken_once_a_step(method: str, local: bool | str) -> None:
    """Gradient checkpointing runs the norms of the local modules twice, and changes nothing."""
    options = {"local": local, "global_blocks": 1, "dropout": 0.0}
    results = []
    for on in (False, True):
        model = towers.compressed("open_clip", method, temporal="uniformer_v2", uniformer_v2=options)
        model.backbone.set_grad_checkpointing(on)
        towers.randomized(model).train()(towers.clips("open_clip")).square().mean().backward()
        counts = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
        assert len(counts) == towers.BLOCKS * (1 + (local == "double"))
        assert all(count == 1 for count in counts)
        results.append([*model.buffers(), *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results)
