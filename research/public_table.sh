#!/usr/bin/env bash
# What research/experiments/smollm2.yaml compares: gates of the default and of the published form, trained on the same
# samples, and rules of heads for the methods that search some. Everything goes to outputs/smollm2-table; what is there
# already is not made again. Then: python research/side_by_side.py research/experiments/smollm2.yaml --output outputs/smollm2-table
#   bash research/public_table.sh                                # in the root of the project; one GPU, some ten minutes
#   MODEL=outputs/models/gemma3-270m FOLDER=outputs/gemma3-table CONTEXT=32768 RULES_CONTEXT=8192 STEPS=250 ANCHORS=2 \
#       bash research/public_table.sh                          # of its 18 layers 3 have gates, too few for Kascade's 5 anchors
#   STEPS=3 CONTEXT=512 bash research/public_table.sh --device cpu    # to the end on a CPU, for trying it out
# Text: research/texts/README.md. The model: make models.
set -euo pipefail
model=${MODEL:-outputs/models/smollm2} out=${FOLDER:-outputs/smollm2-table} context=${CONTEXT:-8192} steps=${STEPS:-1000} rules_context=${RULES_CONTEXT:-$context}
run=(python -m seerattn)
train=(--data books/train-000.jsonl.gz --data proofs/train-000.jsonl.gz)
held=(--data books/validation-000.jsonl.gz --data proofs/validation-000.jsonl.gz)
mkdir -p "$out"

gates() {  # NAME OPTIONS...: gates of a form, with budgets
    local name=$1 && shift
    [ -f "$out/$name/adapter_model.safetensors" ] || "${run[@]}" distill --model "$model" "${train[@]}" --context "$context" \
        --steps "$steps" --batch-size 2 --output "$out/$name" --resume "${DEVICE[@]}" "$@"
    "${run[@]}" calibrate --model "$model" --gates "$out/$name" "${held[@]}" --set max_docs=24 --contexts "$context" --budgets \
        "${DEVICE[@]}"
}

rules() {  # METHOD NAME OPTIONS...
    local method=$1 name=$2 && shift 2
    [ -f "$out/$name.json" ] && return
    "${run[@]}" search "$method" --model "$model" "${held[@]}" --max-docs 24 --output "$out/$name.json" \
        --set context="$rules_context" "${DEVICE[@]}" "$@"
}

DEVICE=("$@")
jobs=()
start() { "$@" > "$out/$(IFS=-; echo "${*:1:3}" | tr -d ' ').log" 2>&1 & jobs+=($!); }
start gates default
start gates published --gate paper
start rules minference minference-paper --set density=.2
start rules minference minference-repository --set variant=repository
start rules moa moa --set samples=4
start rules kascade kascade ${ANCHORS:+--set anchors=$ANCHORS}
for job in "${jobs[@]}"; do wait "$job"; done
