#!/usr/bin/env bash
# Cost of a latent step and of an answer on one GPU, for random weights of Qwen2-VL's shapes; needs no network.
# Usage: benchmarks/gpu.sh OUT_FOLDER [ROWS]
set -euo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT_FOLDER [ROWS]} rows=${2:-8}
cd "$(dirname "$0")/.."
mkdir -p "$out"
step=(python -m benchmarks.step_cost --device cuda --dtype bf16 --gather false --text 120 --rest 100 --batch "$rows")
"${step[@]}" --shape 2b --variants plain,ckpt,lora,lora_ckpt --json "$out/step_2b.json" | tee "$out/step_2b.txt"
"${step[@]}" --shape 7b --variants lora,lora_ckpt --json "$out/step_7b.json" | tee "$out/step_7b.txt"
for shape in 2b 7b; do
  python -m benchmarks.decode_cost --device cuda --dtype bf16 --text 120 --shape "$shape" \
    --json "$out/decode_$shape.json" | tee "$out/decode_$shape.txt"
done
