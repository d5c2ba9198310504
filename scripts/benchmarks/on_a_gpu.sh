#!/bin/bash
# Everything about engine and kernels that only a GPU can show, in one go: is it right, how fast is it, does the plan hold.
#
#   scripts/benchmarks/on_a_gpu.sh [FOLDER]     figures and logs go there; default: gpu-results
#
# Each step is limited in time and goes on without the one before it, so that a short loan of a machine gives something.
# Weights are random in the shape of the released model, but for the embedded one.
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

step tests 300 python -m pytest -q tests/test_engine.py tests/kernels tests/test_pipeline.py
# Captured steps draw what eager ones draw (float32), and what they save.
for steps in eager captured; do
    COGVIEW_STEPS=$steps step "draw-$steps" 120 python -m cogview generate 蓝色背景上的三只狐狸 一个红苹果 -n 4 --seed 7 \
        --device cuda --dtype float32 -o "$out/pictures-$steps"
    COGVIEW_STEPS=$steps step "bench-4b-$steps" 600 python -m cogview bench --random 4b --device cuda --batch 1,8,32 \
        --json "$out/bench-4b-$steps.json"
done
for dtype in int8 int4; do
    step "bench-4b-$dtype" 600 python -m cogview bench --random 4b --device cuda --dtype $dtype --batch 1,8 \
        --json "$out/bench-4b-$dtype.json"
done
shape=(--layers 48 --width 2560 --heads 40 --device cuda)
step released 600 python scripts/benchmarks/compare_released.py "${shape[@]}" --batches 1 8 32 --json "$out/released.json"
step transformers 600 python scripts/benchmarks/compare_transformers.py "${shape[@]}" --json "$out/transformers.json"
step parallel 300 python scripts/benchmarks/parallel.py --device cuda --dtype float32 --upscale --json "$out/parallel.json"
step best-of 300 python scripts/benchmarks/compare_best_of.py --device cuda --json "$out/best-of.json"
step upscale 600 python scripts/benchmarks/compare_upscale.py --device cuda --json "$out/upscale.json"
step planned 600 python scripts/benchmarks/planned_batch.py --device cuda
for dtype in bfloat16 float16; do
    step "kernels-$dtype" 480 python scripts/benchmarks/gpu_kernels.py --dtype $dtype --json "$out/kernels-$dtype.json"
done
step window 300 python scripts/benchmarks/window_attention.py --device cuda
step cross-entropy 300 python scripts/benchmarks/cross_entropy.py --device cuda
COGVIEW_KERNELS=triton step draw-triton 120 python -m cogview generate 蓝色背景上的三只狐狸 一个红苹果 -n 4 --seed 7 \
    --device cuda --dtype float32 -o "$out/pictures-triton"
