# ruff: noqa: E501 - a fault reads best on one line
"""Plants one-line faults in the kernels, one at a time, and sees that the tests of the op catch each.

    python tests/mutants.py [--suite depthwise_conv3d]

Works on a copy of the tree under build/mutants, built for the baseline instruction set; the Triton kernels run in
Triton's interpreter, the CUDA kernels in the emulator. Exit status 1 if a fault survives. A fault that no test catches is a missing test, not a fault to
take off the list.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutants"
COPIED = ("inti_kernels", "csrc", "python", "tests", "benchmarks", "CMakeLists.txt", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """A line's change in a file: ``old``, which stands there once, becomes ``new``."""

    why: str
    file: str
    old: str
    new: str


def _mutants(file: str, *faults: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(why, file, old, new) for why, old, new in faults]


MUTANTS = {
    "pair_interpolate": _mutants(
        "csrc/cpu/pair_interpolate.cpp",
        ("the second frame is the first", "const T* x1 = x0 + p.x_strides.frame;", "const T* x1 = x0;"),
        ("the weights are swapped", "first = e0 / (e0 + e1);", "first = e1 / (e0 + e1);"),
        ("small weights lose their digits", "second = e1 / (e0 + e1);", "second = 1 - first;"),
        ("a chunk ends a token early", "begin + 32 < shape.tokens ? begin + 32 : shape.tokens", "begin + 31 < shape.tokens ? begin + 31 : shape.tokens"),
        ("the second frame has the first one's position", "v1 += load(position1 + c);", "v1 += load(position0 + c);"),
        ("the backward forgets the position", "if (p.position) difference +=", "if (false) difference +="),
        ("the buffer is overwritten", "p.accumulate ? load(grad_x + c) + grad : grad", "grad"),
        ("stale memory is added to", "p.accumulate ? load(grad_x + c) + grad : grad", "load(grad_x + c) + grad"),
        ("the weights' own gradient is dropped", "difference += p.grad_weights[2 * out] - p.grad_weights[2 * out + 1];", ";"),
        ("the second logit's gradient has the wrong sign", "= -p.grad_logits[2 * out];", "= p.grad_logits[2 * out];"),
        ("half of the partial sums start as garbage", "c < 2 * dim; ++c) partial[c] = 0", "c < dim; ++c) partial[c] = 0"),
        ("the last chunk's partial sum is dropped", "i < rows; ++i)", "i < rows - 1; ++i)"),
    )
    + _mutants(
        "csrc/cpu/rows.h",
        ("a lone last channel is skipped", "rest > 0)", "rest > 1)"),
        ("the batch stride is ignored", "batch * strides.batch + frame", "frame"),
    ),
    "native": _mutants(
        "csrc/cpu/vec.h",
        ("bfloat16 is truncated", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
        ("ties go away from zero", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "(bits + 0x8000) >> 16"),
        ("a NaN becomes infinity", "(bits >> 16) | 0x40;", "0x7f80 + (bits >> 16) * 0;"),
        ("float16's subnormals are truncated", "0.5f) - 0x3f000000", "0.5f - 2e-8f) - 0x3f000000"),
        ("float16's infinity becomes a number", "bits_as<Int32s>(magnitude) >= 0x0f800000", "bits_as<Int32s>(magnitude) > 0x0f800000"),
        ("float16 loses its sign", "half | (bits & 0x80000000) >> 16", "half"),
    ),
    "depthwise_conv3d": _mutants(
        "csrc/cpu/depthwise_conv3d.cpp",
        ("the bias of another channel block", "static_cast<const A*>(p.bias)[block.channel + c]", "static_cast<const A*>(p.bias)[c]"),
        ("the gradient's taps aren't turned", "at[t][K - 1 - h][K - 1 - w]", "at[t][h][w]"),
        ("an output is centred on the pair's second frame", "shape.temporal_stride * out_frame + tap - 1", "shape.temporal_stride * out_frame + tap"),
        ("the gradient reads time backwards", "frame + 1 - tap", "frame - 1 + tap"),
        ("the buffer is overwritten", "store(to + c, accumulate ? load(to + c) + v : v);", "store(to + c, v);"),
        ("stale memory is added to", "store(to + c, accumulate ? load(to + c) + v : v);", "store(to + c, load(to + c) + v);"),
        ("the buffer's prefix tokens are cleared", "if (grad_x && !p.accumulate) clear_prefix", "if (grad_x) clear_prefix"),
        ("a frame's sums go into the next one's", "frame_sums.clear();", "if (frame == all * chunk / chunks) frame_sums.clear();"),
        ("the last frame of a chunk is dropped", "frame < all * (chunk + 1) / chunks;", "frame < all * (chunk + 1) / chunks - (chunks == 32);"),
        ("a wide grid's second tile starts too far right", "tile.column < source.width; tile.column += width", "tile.column < source.width; tile.column += width + 1"),
        ("the bias's gradient misses a column", "for (int i = 0; i < tile.columns; ++i) sum +=", "for (int i = 1; i < tile.columns; ++i) sum +="),
        ("a row goes into another one's sums", "outs[h] = &slots[(r - h + halo + K) % K]", "outs[h] = &slots[(r + h + halo + K) % K]"),
        ("the gradient's row is another one", "grads[h] = &slots[(r - h + halo + K) % K]", "grads[h] = &slots[(r + h + halo + K) % K]"),
        ("below the grid there is a gradient of 0", "r + halo < x.height ? 0 : halo", "0"),
        ("above the grid there is a gradient of 0", "r >= halo ? K : K - halo", "K"),
        ("every row of the taps starts again as the bias", "r == 0 ? K : 1, bias", "K, bias"),
        ("the first rows start as what is there", "r == 0 ? K : 1, bias", "1, bias"),
        ("the last row is not handed on", "if (halo && r + 1 == source.height)", "if (false)"),
        ("a prefix token is left unwritten", "k < shape.prefix; ++k)", "k < shape.prefix - 1; ++k)"),
        ("the result's gradient is read as x's dtype", "stage_row<Y>(grad_y,", "stage_row<T>(grad_y,"),
        ("the result's dtype is the other one of 16 bits", "< sizeof(float)) f(x, y);", "< sizeof(float)) f(x, Type<bfloat16>{});"),
    )
    + _mutants(
        "csrc/cpu/grid_rows.h",
        ("the first column is padding", "int(before > 0 ? before : 0)", "int(before >= 0 ? before + 1 : 0)"),
        ("the padding has a position", "row.at[i][c] = 0;", "row.at[i][c] = position && c < tile.channels ? position[c] : A(0);"),
    ),
    "token_features": _mutants(
        "csrc/cpu/token_features.cpp",
        ("the position is forgotten", "return position ? v + load(position + c) : v;", "return v;"),
        ("the frames of a pair change places", "+ frame % 2 * shape.width", "+ (1 - frame % 2) * shape.width"),
        ("the slope is the value", "gelu<N>(load(kept + c)).slope", "gelu<N>(load(kept + c)).value"),
        ("the gradient's mean stays", "(g - mean_g - y * mean_gy)", "(g - y * mean_gy)"),
        ("the buffer is overwritten", "p.accumulate ? load(grad_x + c) + grad : grad", "grad"),
        ("the norm's bias sums what its weight does", "store(sums + dim + c, load(sums + dim + c) + of_row);", "store(sums + dim + c, load(sums + dim + c) + of_row * y);"),
    )
    + _mutants(
        "csrc/cpu/layer_norm.h",
        ("the padding of a last vector counts as a channel", "inside<A>(load, at(c, load) - mean)", "(at(c, load) - mean)"),
        ("eps is forgotten", "double(variance) + eps", "double(variance)"),
    )
    + _mutants(
        "csrc/cpu/partial_sums.cpp",
        ("the last partial sum is dropped", "k < p.terms; ++k", "k < p.terms - 1; ++k"),
    )
    + _mutants(
        "csrc/cpu/rows.h",
        ("a block ends a token early", "least(begin + kTokensOfBlock, tokens)", "least(begin + kTokensOfBlock - 1, tokens)"),
    )
    + _mutants(
        "csrc/cpu/gelu.h",
        ("the tail is cut off at 1", "t > 13.0f", "t > 1.0f"),
        ("the small part of the square is lost", "-0.5f * (t - high) * (t + high)", "-0.0f * (t - high) * (t + high)"),
    ),
    "interpolation_head": _mutants(
        "csrc/cpu/interpolation_head.cpp",
        ("small weights lose their digits", "second = 1 / (1 + std::exp(difference)) + nan_or_0;", "second = 1 - first;"),
        ("infinity is a weight", "nan_or_0 = 0 * difference", "nan_or_0 = 0"),
        ("the second bias is forgotten", "sum_lanes<A>(sum) + A(p.bias2)", "sum_lanes<A>(sum)"),
        ("another frame's bias", "frame * p.frame_bias_pitch", "0 * p.frame_bias_pitch"),
        ("the second frame has the first one's position", "v1 += load(position + dim + c);", "v1 += load(position + c);"),
        ("the weights' own gradient is dropped", "+ Two<N>::difference(p.grad_weights, at.row)", ""),
        ("stale memory is added to", "store(grad_x1 + c, p.accumulate ? load(grad_x1 + c) + grad1 : grad1);", "store(grad_x1 + c, load(grad_x1 + c) + grad1);"),
        ("half of the partial sums start as garbage", "c < 2 * columns; ++c) sums[c] = 0", "c < columns; ++c) sums[c] = 0"),
        ("weight2's sums are the slope's", "upstream * gelu_at.value", "upstream * gelu_at.slope"),
    ),
    "class_levels": _mutants(
        "csrc/cpu/few_rows.cpp",
        ("the last outputs are left out", "parallel_for(parts_of(count, size)", "parallel_for(count / size"),
        ("single rows are left out", "if constexpr (N > 1)", "if constexpr (N > 2)"),
        ("later lines overwrite what the first have summed", "load(to + r * s.in + c) + sums[r]);", "sums[r]);"),
        ("the gradient goes past the GELU", "kept ? v * gelu<A>(load(kept + c)).slope : v", "v"),
        ("the weight's gradient is overwritten", "add = p.accumulate || row > 0", "add = row > 0"),
        ("later rows overwrite what the first have summed", "add = p.accumulate || row > 0", "add = p.accumulate"),
        ("a bias's gradient is one long sum", "double sum = 0;", "A sum = 0;"),
        ("a weight's gradient is one long sum", "kTerms = 32;", "kTerms = 1 << 20;"),
        ("the mean of g·y is forgotten", "(g - mean_g - y * mean_gy)", "(g - mean_g)"),
        ("the norm's bias sums what its weight does", "terms_of_bias += grad;", "terms_of_bias += terms_of_weight;"),
        ("the sums start as what is there", "grad_input[row * s.in + c] = 0;", "grad_input[row * s.in + c] *= 1;"),
    )
    + _mutants(
        "csrc/cpu/class_levels.cpp",
        ("a lone frame is pooled away", "return (frames + 1) / 2;", "return frames / 2;"),
        ("NaN is not the larger one", "(second > first) | (second != second)", "second > first"),
        ("of equal ones the second", "(second > first) |", "(second >= first) |"),
        ("the taps change places in the backward", "v += grad[t - 1] * taps[2];", "v += grad[t - 1] * taps[0];"),
        ("the mean counts the clip's frames", "return sum / A(frames[kGlobalConvolutions - 1]);", "return sum / A(frames[0]);"),
        ("the frame level's gradient is overwritten", "levels.has_frame() ? load(to) + clip.grad_x[t] : clip.grad_x[t]", "clip.grad_x[t]"),
        ("the global level overwrites the frame level", "levels.has_frame() ? load(to) + level : level", "level"),
        ("every frame has the first one's position", "static_cast<const A*>(p.position) + frame * dim", "static_cast<const A*>(p.position)"),
        ("the two norms take each other's eps", "p.eps[first / 4]", "p.eps[1 - first / 4]"),
        ("the halves of a pair are not activated", "gelu<A>(load(preactivation + first + c)).value", "load(preactivation + first + c)"),
        ("the threads work in one place", "thread_number() * global_level_vectors(of_clip)", "0 * global_level_vectors(of_clip)"),
    ),
    "gemm": _mutants(
        "csrc/cpu/gemm.h",
        ("the first terms are lost", "part, now, k > 0, tile,", "part, now, false, tile,"),
        ("a tile's last terms are lost", "for (; k < terms; ++k) add_term();", ""),
        ("two columns of a tile change places", "columns[4] = {low_halves(ac0, bd0), high_halves(ac0, bd0),", "columns[4] = {high_halves(ac0, bd0), low_halves(ac0, bd0),"),
        ("threads pack in the same place", "thread_number() * gemm_block(depth)", "0 * gemm_block(depth)"),
        ("a block starts a tile late", "first = tiles * block / blocks * kTileRows", "first = (tiles * block / blocks + (block == 1)) * kTileRows"),
    )
    + _mutants(
        "csrc/cpu/product.cpp",
        ("the second part of a long product overwrites the first", "p.accumulate || k > 0", "p.accumulate"),
    )
    + _mutants(
        "csrc/cpu/token_features.cpp",
        ("a tile that reaches into the next frame stays in the first", "(row + i) / s.tokens", "row / s.tokens"),
    )
    + _mutants(
        "csrc/cpu/interpolation_head.cpp",
        ("only the last columns count", "before = column ? load(own)", "before = false ? load(own)"),
        ("only the last part counts", ": begin ? load(carried", ": false ? load(carried"),
        ("the cube's rows are the features'", "to + p.width * kTileRows", "to"),
    ),
    "triton pair_interpolate": _mutants(
        "inti_kernels/backends/triton/pair_interpolate.py",
        ("the weights are swapped", "return first / (first + second), second / (first + second)", "return second / (first + second), first / (first + second)"),
        ("small weights lose their digits", "return first / (first + second), second / (first + second)", "return first / (first + second), 1 - first / (first + second)"),
        ("large logits overflow", "largest = tl.maximum(first, second)", "largest = 0 * first"),
        ("the weights' own gradient is dropped", "total += tl.load(grad_weights + 2 * pair, mask=live, other=0).to(SOFTMAX)", "total += 0 * tl.load(grad_weights + 2 * pair, mask=live, other=0).to(SOFTMAX)"),
        ("the second logit's gradient has the wrong sign", "pair + 1, -total, live)", "pair + 1, total, live)"),
        ("the batch stride is ignored", "x += (row // pairs).to(tl.int64) * stride_batch * VECTOR + frame * stride_frame", "x += frame * stride_frame"),
        ("offsets of 32 bits", "clip, frame = (row // pairs).to(tl.int64), 2 * (row % pairs)", "clip, frame = (row // pairs), 2 * (row % pairs)\n    stride_batch = stride_batch.to(tl.int32)"),
        ("float64 softmax in float32", "return tl.float64 if torch.float64 in (x.dtype, logits.dtype) else tl.float32", "return tl.float32"),
    )
    + _mutants(
        "inti_kernels/backends/triton/_tokens.py",
        ("the second frame has the first one's position", "position, dim, channel, mask, WIDE)\n        store", "position, 0, channel, mask, WIDE)\n        store"),
        ("the backward forgets the position", "x0 = load_frame(x, position, 0, channel, mask, WIDE)\n            x1", "x0 = load_frame(x, None, 0, channel, mask, WIDE)\n            x1"),
        ("the buffer is overwritten", "grad0 += tl.load(to, mask=mask, other=0).to(WIDE)", "grad0 += 0 * tl.load(to, mask=mask, other=0).to(WIDE)"),
        ("the buffer is added to twice in the second frame", "grad1 += tl.load(", "grad1 += 2 * tl.load("),
        ("both frames have the first one's partial sums", "tl.store(sums + dim + channel, tl.sum(grad1, 0), mask=there)", "tl.store(sums + dim + channel, tl.sum(grad0, 0), mask=there)"),
        ("a tile's tokens are the next one's too", "(inside < tile_tokens) & (token < tokens)", "(token < tokens)"),
    ),
    "triton depthwise_conv3d": _mutants(
        "inti_kernels/backends/triton/depthwise_conv3d.py",
        ("the first column is padding", "live & (column >= 1)", "live & (column >= 2)"),
        ("a row's end runs into the next row", "live & (column < width - 1)", "live"),
        ("the row below the grid isn't padding", "(row < height - below) & exists", "exists"),
        ("the row above the grid isn't padding", "inside = (row >= -below) & (row < height - below) & columns[k % SPACE] & exists", "inside = (row < height - below) & columns[k % SPACE] & exists"),
        ("the padding has a position", "value = tl.where(inside, value + added[k][None, :], 0)", "value = value + added[k][None, :]"),
        ("the bias is forgotten", "if bias is not None:\n        value +=", "if bias is not None:\n        value += 0 *"),
        ("an output is centred on the pair's second frame", "(at,), 2 * out, source", "(at,), 2 * out + 1, source"),
        ("a run's last frame is dropped", "tl.minimum(first + run, out_frames)", "tl.minimum(first + run, out_frames - 1)"),
        ("the frame before the run is forgotten", "at = fed[1]\n    else:", "at = start\n    else:"),
        ("the gradient's open frame is dropped", "before = fed[2]", "before = zeros"),
        ("a prefix token is left unwritten", "mask = (token < prefix)[:, None]", "mask = (token < prefix - 1)[:, None]"),
        ("the buffer's prefix tokens are cleared", "(grad_x is not None) and (not ACCUMULATE):", "grad_x is not None:"),
        ("the buffer is overwritten", "grad += tl.load(to, mask=mask, other=0).to(value.dtype)", "grad += 0 * tl.load(to, mask=mask, other=0).to(value.dtype)"),
        ("a clip's second run has the next clip's partial sums", "clip * runs + first // run", "clip + first // run"),
        ("the bias's gradient counts a walk too many", "if time == 1:", "if time >= 1:"),
        ("the weight's gradient reads a frame late", "frame = STRIDE * out + time - 1", "frame = STRIDE * out + time"),
        ("the runs share a row of partial sums", "partials += ((clip * runs + first // run) * tiles + tile)", "partials += (clip * runs * tiles + tile)"),
        ("a tile's patches are the next one's too", "live = (inside < tile_tokens) & (token < height * width)", "live = token < height * width"),
        ("the taps of a row are mirrored", "* SPACE + h) * SPACE + w) * TAP_STEP", "* SPACE + h) * SPACE + SPACE - 1 - w) * TAP_STEP"),
    ),
    "cuda pair_interpolate": _mutants(
        "csrc/cuda/interpolate.h",
        ("a missing barrier: sums are added up before they are there", "    __syncthreads();\n    // A thread adds up", "    // A thread adds up"),
        ("one buffer instead of two", "(step % 2) * kBuffer", "0 * kBuffer"),
        ("a lane is left out of the warp's sum", "for (int distance = 16; distance > 0; distance /= 2) sum +=", "for (int distance = 8; distance > 0; distance /= 2) sum +="),
        ("the second frame has the first one's position", "odd_position = load_wide<V>(position + p.dim + channel);", "odd_position = load_wide<V>(position + channel);"),
        ("a token that isn't there is written", "first + i * kInterpolateWarps < p.tokens;", "first + i * kInterpolateWarps <= p.tokens;"),
        ("a token that isn't there has a gradient", "grad[i] = live[i] ? start_load<V>(from) : Loaded<T, V>{};", "grad[i] = start_load<V>(from);"),
        ("a tile's tokens are the next one's too", "if (last > p.tokens) last = p.tokens;", "last = p.tokens;"),
        ("the buffer is overwritten", "odd_grad[k] += old_odd[k];", ";"),
        ("the weights' own gradient is dropped", "(static_cast<S>(sum) + source.grad_difference(pair))", "static_cast<S>(sum)"),
        ("the batch stride is ignored", "static_cast<const T*>(p.grad_z) + at.clip * p.grad_z_strides.batch", "static_cast<const T*>(p.grad_z) + 0 * p.grad_z_strides.batch"),
    )
    + _mutants(
        "csrc/cuda/pair_interpolate.cu",
        ("large logits overflow", "exponential(first - largest), b = exponential(second - largest)", "exponential(first), b = exponential(second)"),
        ("float64 logits in float32", "if (shape.logits_dtype != DType::float64) return", "if (true) return"),
    )
    + _mutants(
        "csrc/cuda/vectors.h",
        ("accesses wider than the strides allow", "dim % unit == 0 && divides(unit, strides) && all_aligned", "dim % unit == 0 && all_aligned"),
    )
    + _mutants(
        "csrc/cuda/partial_sums.h",
        ("the last partial sums are dropped", "for (; k < p.rows; k += groups, at += step) sums[0]", "for (; k < p.rows - 1; k += groups, at += step) sums[0]"),
        ("a run's columns are the next one's", "column / p.run * p.run_pitch + column % p.run", "column"),
        ("a sum that goes on is a sum of its own", "    while (p.sums[which].goes_on) ++which;\n", ""),
        ("few columns are summed by a warp alone", "for (int half = groups / 2; half > 0", "for (int half = groups < 8 ? groups / 2 : 4; half > 0"),
        ("a missing barrier: sums are added up before they are there", "    __syncthreads();\n    if (group < half)", "    if (group < half)"),
    ),
    "cuda depthwise_conv3d": _mutants(
        "csrc/cuda/depthwise_conv3d_tile.h",
        ("a missing barrier: a frame's tile is overwritten while it is read", "    if (frame + 1 < end) stager.put(buffers + (turn ^ 1) * size, frame + 1);\n    __syncthreads();", "    if (frame + 1 < end) stager.put(buffers + (turn ^ 1) * size, frame + 1);"),
        ("the padding isn't cleared", "Frames::clear(buffers, 2 * size);", "Frames::clear(buffers, size);"),
        ("the halo begins a row late", "top = place.top - halo > 0 ? place.top - halo : 0;", "top = place.top;"),
        ("a strip's patches run past the grid", "there < P ? (1u << there) - 1 : (1u << P) - 1", "(1u << P) - 1"),
        ("a channel that doesn't exist is loaded", "item < items() && channel < channels ?", "item < items() ?"),
        ("the position of another frame", "position + frame * position_step + channel()", "position + channel()"),
    )
    + _mutants(
        "csrc/cuda/depthwise_conv3d_sums.h",
        ("a warp's strips are written before they are exchanged", "      __syncwarp();\n#pragma unroll", "#pragma unroll"),
        ("the buffer is overwritten", "sum[k] += old[k];", ";"),
        ("a prefix token is left unwritten", "const int per_frame = prefix * kVectors;", "const int per_frame = prefix * kVectors - kVectors;"),
        ("patches off the grid count in the position's sums", "sum += place.inside(p) ? sums.at[p][c] : 0;", "sum += sums.at[p][c];"),
    )
    + _mutants(
        "csrc/cuda/depthwise_conv3d_backward.h",
        ("the taps aren't turned", "return 3 * SPACE * SPACE - 1 - ((time * SPACE + h) * SPACE + w);", "return (time * SPACE + h) * SPACE + w;"),
        ("a bias's gradient counts the outputs of other runs", "if (h != SPACE / 2 || !owned) continue;", "if (h != SPACE / 2) continue;"),
        ("the weight's gradient knows nothing of the position", "numbers[c] + rows[n][c]", "numbers[c]"),
        ("a missing barrier: the weight's sums overwrite what a strip is written by", "  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;\n  __syncthreads();\n", "  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;\n"),
        ("the gradient of the frame before is dropped", "if (STRIDE == 1 && begin > 0) --begin;", ";"),
    )
    + _mutants(
        "csrc/cuda/depthwise_conv3d.cu",
        ("the run's last frame is dropped", "if (STRIDE == 1 && place.last == p.frames) writer.write(at", "if (false) writer.write(at"),
        ("the entry point sums the first tap's for the bias", "sums.add({q.weight_partials + kTaps, rows", "sums.add({q.weight_partials, rows"),
    ),
    "cuda token_features": _mutants(
        "csrc/cuda/gemm.h",
        ("a missing barrier between staging and the tensor cores", "    if (more) stage((step + 1) % 2);\n    __syncthreads();\n  }\n  wmma_finish", "    if (more) stage((step + 1) % 2);\n  }\n  wmma_finish"),
        ("a missing barrier between staging and the sums", "    if (more) stage((step + 1) % 2);\n    __syncthreads();\n  }\n  fma_finish", "    if (more) stage((step + 1) % 2);\n  }\n  fma_finish"),
        ("a warp reads its sums before all lanes have left them", "    __syncwarp();\n#pragma unroll 1", "#pragma unroll 1"),
        ("one buffer instead of two", "const Shared<T> weights = shared + (step % 2 * Tile::kBuffer", "const Shared<T> weights = shared + (0 * Tile::kBuffer"),
        ("the rotation is forgotten", "a_row ^ rotation", "a_row"),
    )
    + _mutants(
        "csrc/cuda/token_features.cu",
        ("the frames of a pair change places", "(2 * pair + place.frame % 2) * columns", "(2 * pair + 1 - place.frame % 2) * columns"),
        ("eps is forgotten", "moments[i].variance() + p.eps", "moments[i].variance()"),
        ("only the first rows' statistics are kept", "blockIdx.x % p.column_tiles == 0)", "blockIdx.x == 0)"),
        ("a block of more threads than its launch bounds", "blocks, 32 * kWarps, 0, p.stream, 32 * kWarps}, q);\n  });\n}\n\nvoid token_features_normalize", "blocks, 64 * kWarps, 0, p.stream, 32 * kWarps}, q);\n  });\n}\n\nvoid token_features_normalize"),
        ("the position is not normalised with its token", "run[k] + late.position[i][k] - mean[i]", "run[k] - mean[i]"),
    )
    + _mutants(
        "csrc/cuda/token_features_activation.h",
        ("the frames of a pair change places", "(2 * pair + tile.frame % 2) * p.width", "(2 * pair + 1 - tile.frame % 2) * p.width"),
    )
    + _mutants(
        "csrc/cuda/token_features_backward.h",
        ("a total takes one row's place for all", "p.total + (row + r) * p.in.dim", "p.total + row * p.in.dim"),
        ("what was in 16 bits doesn't reach the total", "    if (p.accumulate) {\n      const auto before", "    if (p.accumulate && !TOTAL) {\n      const auto before"),
        ("the gradient's rows lie side by side", "p.grad_features + pair * p.grad_pitch", "p.grad_features + pair * 2 * p.width"),
        ("rows are read before all of them are there", "kept, first_column);\n    __syncthreads();", "kept, first_column);"),
        ("rows are overwritten while they are read", "    __syncthreads();  // before others' rows", "    // before others' rows"),
        ("all blocks of a wide row have its first columns", "const int first_column = tile.columns * p.slab", "const int first_column = 0 * p.slab"),
    )
    + _mutants(
        "csrc/cuda/partial_sums.h",
        ("an array's elements are bytes", "static_cast<char*>(array) + i * bytes", "static_cast<char*>(array) + i + 0 * bytes"),
    ),
    "cuda interpolation_head": _mutants(
        "csrc/cuda/interpolation_head.cu",
        ("the columns past the edge are summed", "if (k < at.left) total += gelu(sums[k])", "total += gelu(sums[k]) + (k < at.left ? W(0) : W(1)) + 0 * gelu(sums[k])"),
        ("another frame's bias", "frame_bias + static_cast<int64_t>(row / tokens) * columns", "frame_bias + static_cast<int64_t>(0) * columns"),
        ("the second bias is forgotten", "read<W>(bias2, dtype, 0) - read<W>(bias2, dtype, 1)", "read<W>(bias2, dtype, 0)"),
        ("the last partial difference is dropped", "for (int i = 0; i < count; ++i) sum += load(partials", "for (int i = 0; i < count - 1; ++i) sum += load(partials"),
        ("small weights lose their digits", "second(1 / (1 + exponential(logits)) +", "second(1 - 1 / (1 + exponential(-logits)) +"),
    )
    + _mutants(
        "csrc/cuda/partial_sums.h",
        ("the second row's gradient has the wrong sign", "p.sums[which].negated ? -sum : sum", "sum"),
    )
    + _mutants(
        "csrc/cuda/column_sums.h",
        ("a missing barrier: the warps' sums are added up before they are there", "  __syncthreads();\n", ""),
    ),
    "cuda class_levels": _mutants(
        "csrc/cuda/class_levels_rows.h",
        ("a row's position is another frame's", "load(in.position + position + column)", "load(in.position + column)"),
        ("the buffer is overwritten", "in.accumulate ? load(to) + value : value", "value"),
        ("a lane is left out of the warp's sum", "for (int distance = 16; distance > 0; distance /= 2) sum +=", "for (int distance = 8; distance > 0; distance /= 2) sum +="),
        ("eps is forgotten", "inverse_root(over_warp(squares) / columns + eps)", "inverse_root(over_warp(squares) / columns)"),
        ("a token's gradient along itself stays", "(g - over_dim - normal * along)", "(g - over_dim)"),
        ("the pairs' gradient doesn't pass through GELU", "narrow<T>(value * Gelu<W>(widen(load(preactivation + column))).slope)", "narrow<T>(value)"),
        ("rows behind the first sixteen are lost", "first += kSumWarps * kSumRun) {", "first += rows) {"),
        ("weight and bias of a LayerNorm change places", "(which ? of.bias : of.weight)", "(which ? of.weight : of.bias)"),
        ("the last columns' gradients are lost", "(p.pairs.in.columns + 31) / 32;", "p.pairs.in.columns / 32;"),
    )
    + _mutants(
        "csrc/cuda/class_levels.cu",
        ("the first and the last tap change places", "if (t > 0) value += before * taps[0];", "if (t > 0) value += before * taps[2];"),
        ("they do on the way back", "        value += before * taps[2];", "        value += before * taps[0];"),
        ("of equal neighbours the second counts", "second > first ||", "second >= first ||"),
        ("NaN is not taken", "second > first || second != second", "second > first"),
        ("a last frame without a neighbour is lost", "  if (2 * i + 1 == frames) return first;", "  if (2 * i + 1 == frames) return 0;"),
        ("its gradient is", "grad_y.set(2 * t, grad);\n        }", "grad_y.set(2 * t, 0 * grad);\n        }"),
        ("the mean's gradient is that of every frame", "grad_y.set(t, of_mean / frames[kConvolutions - 1])", "grad_y.set(t, of_mean)"),
        ("the level is lost beside the frame's", "gelu(widen(load(p.pair_preactivation + at))) + level : level", "gelu(widen(load(p.pair_preactivation + at))) : level"),
        ("only the first clips' parameters count", "clip < p.batch; clip += kSumWarps)", "clip < p.batch; clip += p.batch)"),
    ),
    "triton token_features": _mutants(
        "inti_kernels/backends/triton/token_features.py",
        ("the frames of a pair change places", "* 2 * width + row % 2 * width)[:, None]", "* 2 * width + (1 - row % 2) * width)[:, None]"),
        ("channels that aren't there count in the variance", "squares += tl.where(there, away * (value - moved), 0)", "squares += away * (value - moved)"),
        ("eps is forgotten", "tl.sqrt(variance + EPS)", "tl.sqrt(variance)"),
        ("the product's tokens lack their position", "value += tl.load(position + inner[None, :], mask=mask, other=0).to(WIDE)", "value += 0 * tl.load(position + inner[None, :], mask=mask, other=0).to(WIDE)"),
        ("both frames have the first one's upstream gradient", "stride_batch * VECTOR + row % 2 * width", "stride_batch * VECTOR"),
        ("a token's gradient along itself stays", "- of_one - value * of_self) * scale", "- of_one) * scale"),
    ),
    "triton interpolation_head": _mutants(
        "inti_kernels/backends/triton/interpolation_head.py",
        ("the second bias is forgotten", "tl.load(bias2).to(WIDE) - tl.load(bias2 + 1).to(WIDE)", "tl.load(bias2).to(WIDE)"),
        ("the product adds another frame's bias", "((row // tokens).to(tl.int64) * frame_step)[:, None]", "((row // tokens).to(tl.int64) * 0)[:, None]"),
        ("the last block's partial difference is dropped", "for _block in range(count):", "for _block in range(count - 1):"),
        ("the cube has the features' weights", "weight1 + width\n", "weight1\n"),
        ("the weights' own gradient is dropped", "total += tl.load(grad_weights + 2 * pair, mask=live, other=0).to(WIDE)", "total += 0 * tl.load(grad_weights + 2 * pair, mask=live, other=0).to(WIDE)"),
        ("the tiles share a row of partial sums", "(tile.to(tl.int64) * frames_in_all + row) * hidden", "(tile.to(tl.int64) + row) * hidden"),
    ),
    "triton": _mutants(
        "inti_kernels/backends/triton/_launch.py",
        ("the last partial sum is dropped", "for first in range(0, count, 8):", "for first in range(0, count - 1, 8):"),
        ("garbage behind the last partial sum", "(number < count)[:, None, None] & mask[None, :, :]", "(number < count + 1)[:, None, None] & mask[None, :, :]"),
        ("rows past the thirty-second are lost", "lambda at: triton.cdiv(rows, at.tokens) * at.blocks(columns)", "lambda at: at.blocks(columns)"),
        ("accesses wider than the strides allow", "unit(x, x.shape[-1], *strides(x, 1).values())", "unit(x, x.shape[-1])"),
        ("a buffer takes every run of the tuner", '{"restore_value": ["grad_x"]} if accumulates else {}', "{}"),
        ("tuning though PyTorch is to be deterministic", '!= "1" or torch.are_deterministic_algorithms_enabled():', '!= "1":'),
    ),
    "inti": _mutants(
        "inti_kernels/backends/inti.py",
        ("what the kernels add to x in another buffer is lost", "        buffer += shared", "        pass"),
        ("the class tokens' gradient is lost", "            _add_to_class_tokens(buffer, of_class, sizes.prefix)", "            pass"),
        ("the mean token's gradient is that of every token", "of_class[:, :, None] / grad_x.shape[2]", "of_class[:, :, None]"),
        ("the position's gradient forgets the class tokens", "of_class.sum(0) if need.position else None", "None"),
        ("the position's gradient forgets the cube level", "            shared = of_x if shared is None else shared\n            positions.append(of_position)\n        if grad_features", "            shared = of_x if shared is None else shared\n        if grad_features"),
        ("the two norms of the frame level take each other's eps", "self.sizes.eps[1:]", "self.sizes.eps[:0:-1]"),
        ("kept and recomputed change places", "kept.token_preactivation.numel()", "not kept.token_preactivation.numel()"),
    )
    + _mutants(
        "inti_kernels/backends/_class_levels.py",
        ("of equal neighbours the second counts", "(second > first) |", "(second >= first) |"),
        ("a last frame without a neighbour is lost", "torch.cat((of_clip, rest), dim=1)", "torch.cat((of_clip, 0 * rest), dim=1)"),
        ("the taps change places on the way back", "of_clip[:, :-1].addcmul_(grad[:, 1:], taps[0])", "of_clip[:, :-1].addcmul_(grad[:, 1:], taps[2])"),
        ("a bias's gradient is the mean", "[:, None], grad.sum((0, 1))]", "[:, None], grad.mean((0, 1))]"),
    ),
}  # fmt: skip


# What catches them: test files, and what of them is left out. Of a suite that isn't here: tests/test_<suite>.py.
TESTS = {
    "depthwise_conv3d": ["tests/test_depthwise_conv3d.py", "tests/test_cpu.py"],
    "class_levels": ["tests/test_class_levels.py", "tests/test_cpu.py"],
    "gemm": ["tests/test_cpu.py"],
    "token_features": ["tests/test_token_features.py", "tests/test_cpu.py"],
    "interpolation_head": ["tests/test_interpolation_head.py", "tests/test_cpu.py"],
    "triton pair_interpolate": ["tests/test_pair_interpolate.py", "tests/test_triton_interpreted.py"],
    "triton depthwise_conv3d": ["tests/test_depthwise_conv3d.py", "tests/test_triton_interpreted.py"],
    "triton token_features": ["tests/test_token_features.py", "tests/test_triton_interpreted.py"],
    "triton interpolation_head": ["tests/test_interpolation_head.py", "tests/test_triton_interpreted.py"],
    "triton": ["tests/test_triton_interpreted.py"],
    "inti": ["tests/test_inti.py", "tests/test_class_levels.py"],
} | {
    f"cuda {op}": [f"tests/test_{op}.py", "tests/test_cuda_emulated.py", "tests/test_cuda_launches.py"]
    for op in ("pair_interpolate", "depthwise_conv3d", "token_features", "interpolation_head", "class_levels")
}
SLOW = "not compile and not opcheck and not export"  # a compiler is what they wait for
SLOW_INTERPRETED = f"{SLOW} and not traffic and not 682 and not checkpointed and not vmap"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(MUTANTS), action="append", help="only these; may be repeated")
    suites = parser.parse_args().suite or sorted(MUTANTS)
    _copy()
    caught = survived = 0
    for suite in suites:
        _build(suite)
        if not _passes(suite):
            print(f"{suite}: the tests fail without any fault; nothing can be said of the mutants")
            return 1
        for mutant in MUTANTS[suite]:
            start = time.monotonic()
            alive = _survives(suite, mutant)
            survived, caught = survived + alive, caught + (not alive)
            print(
                f"{'SURVIVED' if alive else 'caught  '} {suite}: {mutant.why} ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
    print(f"{caught} passed, {survived} failed")
    return 1 if survived else 0


def _copy() -> None:
    """The sources, where they differ from what is there: times of change stay true, also after a fault that an
    interrupted run has left behind, and a run compiles only what changed."""
    tree = WORK / "tree"
    sources = [path for name in COPIED for path in (ROOT / name, *sorted((ROOT / name).rglob("*"))) if path.is_file()]
    left_out = ("__pycache__", "_native", "_cuda.")
    wanted = {
        tree / path.relative_to(ROOT): path
        for path in sources
        if not any(part.startswith(left_out) for part in path.relative_to(ROOT).parts)
    }
    for path in sorted(tree.rglob("*")) if tree.exists() else []:
        if path.is_file() and path not in wanted:
            path.unlink()
    for target, source in wanted.items():
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _survives(suite: str, mutant: Mutant) -> bool:
    path = WORK / "tree" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.file} must contain {mutant.old!r} once, it does {text.count(mutant.old)} times: {mutant.why}"
        )
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        _build(suite)
        return _passes(suite)
    finally:
        path.write_text(text)


def _build(suite: str) -> None:
    # The tools that pip installed stand beside this Python.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    environment = {**os.environ, "PATH": path}
    build = WORK / "build"
    options = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", "-DINTI_CPU_ISAS=baseline", "-DINTI_EMULATOR=ON"]
    _run(["cmake", "-S", str(WORK / "tree"), "-B", str(build), *options], environment)
    targets = ["_native", *(["cuda_emulated"] if suite.startswith("cuda") else [])]
    _run(["cmake", "--build", str(build), "--target", *targets], environment)


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _passes(suite: str) -> bool:
    """Whether a suite's tests pass; a crash or a hang is a caught fault too. What needs a compiler is left out: slow."""
    environment = {**os.environ, "PYTHONPATH": str(WORK / "tree"), "HYPOTHESIS_PROFILE": "mutants"}
    (native,) = (WORK / "build").glob("_native*")
    environment["INTI_NATIVE_LIBRARY"] = str(native)
    if suite.startswith("cuda"):  # named, it is what the tests run on
        (emulated,) = (WORK / "build").glob("_cuda*")
        environment["INTI_CUDA_LIBRARY"] = str(emulated)
    interpreted = suite.startswith("triton")
    slow = interpreted or suite.startswith("cuda")
    if slow:
        environment["OMP_NUM_THREADS"] = "1"
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-n", "2"] if slow else []
    command += [*TESTS.get(suite, [f"tests/test_{suite}.py"]), "-k", SLOW_INTERPRETED if interpreted else SLOW]
    try:
        done = subprocess.run(command, cwd=WORK / "tree", env=environment, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == 2 and slow and re.search(r"\b[1-9]\d* failed", done.stdout):
        return False  # what xdist makes of -x
    if "node down: Not properly terminated" in done.stdout:
        return False  # the fault ended the workers' processes, at which xdist itself may stumble
    if done.returncode in (2, 3, 4, 5):  # interrupted, internal error, usage, no tests: not a verdict
        raise SystemExit(f"pytest did not run the tests of {suite}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
