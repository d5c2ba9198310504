#!/bin/bash
# Run every check of decoding, kernels, planning and training that needs a GPU: correctness, speed and memory. The training
# of the embedded model is separate: cogview run emoji-gpu
#
#   scripts/benchmarks/on_a_gpu.sh [FOLDER]     metrics and logs go to FOLDER (default: gpu-results)
#
# Each step has a time limit and does not depend on earlier steps, so that a short session gives partial results.
# Weights are random, in the shape of the v1 model, except those of the embedded model.
set -u
cd "$(dirname "$0")/../.."
out=${1:-gpu-results}
mkdir -p "$out"
export PYTHONPATH="$PWD"
nvidia-smi > "$out/device.txt"

step() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" > "$out/$name.txt" 2>&1 || echo "   status $? (see $out/$name.txt)"
    tail -n 12 "$out/$name.txt"
}

step tests 300 python -m pytest -q tests/generation/test_decode.py tests/kernels tests/pipeline/test_cogview.py
# CUDA graphs generate the same images as eager steps (float32); how much time they save.
for graphs in 0 1; do
    export COGVIEW_CUDA_GRAPHS=$graphs
    step "generate-graphs-$graphs" 120 python -m cogview generate 蓝色背景上的三只狐狸 一个红苹果 -n 4 --seed 7 \
        --device cuda --dtype float32 -o "$out/images-graphs-$graphs"
    step "bench-4b-graphs-$graphs" 600 python -m cogview bench --random 4b --device cuda --batch 1,8,32 \
        --json "$out/bench-4b-graphs-$graphs.json"
done
unset COGVIEW_CUDA_GRAPHS
for dtype in int8 int4; do
    step "bench-4b-$dtype" 600 python -m cogview bench --random 4b --device cuda --dtype $dtype --batch 1,8 \
        --json "$out/bench-4b-$dtype.json"
done
shape=(--layers 48 --width 2560 --heads 40 --device cuda)
step v1 600 python scripts/benchmarks/compare_v1.py "${shape[@]}" --batches 1 8 32 --json "$out/v1.json"
step peers 900 python scripts/benchmarks/compare_peers.py "${shape[@]}" --dtypes bfloat16 --tokens 512 --json "$out/peers.json"
step speculative 600 python scripts/benchmarks/speculative.py --device cuda --dtype float32 --result "$out/speculative.json"
step best-of 300 python scripts/benchmarks/compare_best_of.py --device cuda --json "$out/best-of.json"
step upscale 600 python scripts/benchmarks/compare_upscale.py --device cuda --json "$out/upscale.json"
step planned 600 python scripts/benchmarks/planned_batch.py --device cuda
for dtype in bfloat16 float16; do
    step "kernels-$dtype" 480 python scripts/benchmarks/gpu_kernels.py --dtype $dtype --json "$out/kernels-$dtype.json"
done
# Training: 1b whole, and half of 4b's layers, at 1,088 positions; with recomputation, compilation and our kernels.
train=(python scripts/benchmarks/train_step.py --device cuda --rounds 3 --steps 5 --warmup 3 --precisions bfloat16)
step train-1b 600 "${train[@]}" --presets 1b --rows 16 --checkpointing none selective full --json "$out/train-1b.json"
step train-1b-compiled 600 "${train[@]}" --presets 1b --rows 16 --compile on --json "$out/train-1b-compiled.json"
COGVIEW_KERNELS=triton step train-1b-triton 600 "${train[@]}" --presets 1b --rows 16 --json "$out/train-1b-triton.json"
step train-4b-half 600 "${train[@]}" --layers 24 --rows 8 --engines torch zero1 zero2 zero1-offload --json "$out/train-4b-half.json"
step window 300 python scripts/benchmarks/window_attention.py --device cuda
step cross-entropy 300 python scripts/benchmarks/cross_entropy.py --device cuda
COGVIEW_KERNELS=triton step generate-triton 120 python -m cogview generate 蓝色背景上的三只狐狸 一个红苹果 -n 4 --seed 7 \
    --device cuda --dtype float32 -o "$out/images-triton"
