#!/usr/bin/env bash
# The GPU benchmarks one after the other, so that each has the card to itself.
#
#   benchmarks/run_all.sh OUT SMOLLM2 [part ...]        parts: graphs float16 profile pinned learning learning16 long24
#                                                       long80 peaks rollout stock steps run200 (all of them without a
#                                                       name, in this order)
#
# OUT gets the results, a log of each part and `timeline`, a line for every part that has ended: seconds since the start,
# the part and its exit status. SMOLLM2 is the folder of SmolLM2-135M-Instruct. Checkpoints of other shapes are random
# and go to $CHECKPOINTS (OUT/checkpoints), which wants 40 GB.
set -u
out=$(realpath -m "$1") small=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out"
checkpoints=${CHECKPOINTS:-$out/checkpoints}
large=$checkpoints/qwen3-8b-bf16
python=${PYTHON:-python}
started=$(date +%s)

part() { # NAME SECONDS COMMAND...: runs it, with a limit
    local name=$1 limit=$2
    shift 2
    local status=0
    timeout "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
    echo "$(($(date +%s) - started)) $name $status" >> "$out/timeline"
}

large_checkpoint() {
    [ -f "$large/config.json" ] && return
    part checkpoint 300 "$python" benchmarks/random_checkpoint.py qwen3-8b "$large" --dtype bf16 --context 266240
}

long() { # GIB LENGTH CACHE
    large_checkpoint
    # Graphs, since thousands of tokens are sampled one after the other, but of vLLM's own kernels, which starts sooner.
    part "long$1" 590 "$python" benchmarks/grpo_step.py --model "$large" --cap "$1" --longest "$2" --timeout 580 \
        --set "rollout.kv_cache_dtype=$3" rollout.torch_compile=false train.worst_case_first=false \
        parity.max_mean=1 parity.max_p99=3 --out "$out" # random weights are far apart, above all beside an fp8 cache
}

learning() { # NAME SYSTEMS [KEY=VALUE ...]
    local name=$1 systems=$2
    shift 2
    # shellcheck disable=SC2086
    part "$name" 800 "$python" benchmarks/learning_vs_trl.py --model "$small" --systems $systems --seeds 0 1 2 3 \
        --eval-steps 20 --together --vllm-share 0.13 --timeout 780 --out "$out/$name" ${1:+--set "$@"}
}

for name in "${@:-graphs float16 profile pinned learning learning16 long24 long80 peaks rollout stock steps run200}"; do
    for one in $name; do
        case $one in
            graphs)
                part graphs 240 "$python" -m pytest -q -m gpu -s tests/test_layer_graphs_gpu.py tests/test_pinned_memory.py \
                    tests/test_packed_attention_gpu.py tests/test_fused_gpu.py
                ;;
            profile)
                for graphs in false true; do
                    part "profile-$graphs" 240 "$python" benchmarks/profile_step.py examples/arithmetic.yaml \
                        "model.model_name_or_path=$small" rollout.engine=vllm rollout.enforce_eager=false \
                        rollout.torch_compile=true "train.cuda_graphs=$graphs" eval.eval_steps=0 checkpoint.save_steps=0 parity.action=warn \
                        --skip 6 --steps 12 --out "$out"
                done
                ;;
            pinned) part pinned 120 "$python" benchmarks/pinned_memory.py --out "$out" ;;
            float16)
                part float16-products 120 "$python" -m pytest -q -m gpu -s tests/test_quant_gemm_gpu.py -k float16
                TANDEM_TEST_MODEL=$small part float16-engines 240 "$python" -m pytest -q -m gpu -s tests/test_vllm_gpu.py \
                    -k "f16 or yarn"
                ;;
            learning) learning learning "tandem trl" ;;
            learning16) learning learning16 tandem model.dtype=float16 ;; # beside `learning`; TRL stays in bfloat16
            long24) long 24 131072 fp8 ;;
            long80) long 80 262144 auto ;;
            peaks) part peaks 300 "$python" benchmarks/plan_peaks.py --checkpoints "$checkpoints" --out "$out" ;;
            rollout)
                large_checkpoint
                part rollout 560 "$python" benchmarks/rollout.py "$large" --together --timeout 550 --out "$out"
                ;;
            stock)
                large_checkpoint
                part stock 400 "$python" benchmarks/rollout.py "$large" --systems vllm-bnb tandem-nf4 tandem-nf4-stock \
                    --batches 32 --cycles 1 --kv-gib 3 --together --timeout 390 --out "$out/stock"
                for dtype in bfloat16 float16; do
                    part "small-$dtype" 400 "$python" benchmarks/rollout.py "$small" --dtype "$dtype" --systems vllm-bnb \
                        tandem-nf4 tandem-nf4-stock vllm-bf16 tandem-bf16 tandem-bf16-stock --batches 64 --cycles 5 \
                        --kv-gib 2 --together --timeout 390 --out "$out/$dtype"
                done
                ;;
            steps)
                large_checkpoint
                part steps 900 "$python" benchmarks/grpo_step.py --model "$large" --systems tandem trl-awake unsloth \
                    --together --timeout 880 --out "$out"
                ;;
            run200)
                part run200 300 "$python" benchmarks/long_run.py --steps 200 --device cuda --model "$small" \
                    --set rollout.engine=vllm rollout.enforce_eager=false --results "$out"
                ;;
            *) echo "there is no part $one" >&2 && exit 2 ;;
        esac
    done
done
cat "$out/timeline"
