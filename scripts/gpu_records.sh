#!/usr/bin/env bash
# Makes the GPU records under results/, part by part, on one GPU with Triton; nothing is downloaded.
#
#   scripts/gpu_records.sh OUT PART…
#
# PARTS: speed ladder shapes caps streams policies prompts snapshots sampling recall-speed long precision blocks diagnosis recall
#        passages facts streameval reply sweeps cliff tests sanitizer
# MODELS (default: builtin) are what the parts from precision to cliff run on, and TEXTS (pg19 and wikitext; files work too) what they
# read; reply reads LONG_TEXT, a text of about a million tokens. A part that was cut off goes on when called again with the same OUT.
# Copy what OUT holds to results/, without the runs/ folders, and write the tables: sinkstream report --results results --docs
# docs/*.md README.md
set -uo pipefail
out=$1
shift
python=${PYTHON:-python3}
models=${MODELS:-builtin}
texts=${TEXTS:-pg19 wikitext}
first_text=${texts%% *}
long_text=${LONG_TEXT:-$first_text}
bench() { "$python" -m sinkstream.cli bench --out "$out/bench" --backend fused --resume "$@"; }
run() { "$python" -m sinkstream.cli "$@"; }
on_models() { for model in $models; do "$@" "$model" "$(basename "$model")"; done; }

speed() {
  bench --tokens 1000 --profile
  bench --tokens 20000 --policy strict
}
ladder() { run bench --out "$out/bench" --ladder --tokens 500 --seconds 30 --resume; }
shapes() {
  bench --policy strict --dtype bfloat16 --shape llama-3.2-1b,llama-3.1-8b
  bench --policy strict --shape pythia-160m,pythia-410m,pythia-1.4b,pythia-6.9b
}
caps() { bench --policy strict --cap 512,1024,2052,4096,8192,16384,32768; }
streams() { bench --policy strict --streams 1,2,4,8; }
both() {  # the same of both shapes that the engine is judged by
  bench --shape pythia-2.8b --cap 2052 "$@"
  bench --shape llama-3.2-1b --dtype bfloat16 --cap 2052 "$@"
}
REFRESHED=compress_every=64:refresh=64
LOOKING=refresh-window-attention:$REFRESHED,refresh-accumulated-attention:$REFRESHED,adaptive-entropy
policies() {
  both --tokens 20000 --seconds 30 --policy "strict,$LOOKING,refresh-uniform:$REFRESHED,refresh-key-norm:$REFRESHED"
  both --tokens 20000 --seconds 30 --policy strict,max-drop:compress_every=64:max_drop=8,slack:slack=16
}
prompts() {
  both --policy strict --prefill 512,2048,8192,32768
  both --policy "$LOOKING" --prefill 2048,8192 --engine-only
}
snapshots() { both --policy strict --snapshot; }
sampling() { both --policy strict --sampling; }
recall-speed() {
  local kept=strict:recall=lexical read=strict:recall=lexical:recall_archive=text
  bench --shape llama-3.2-1b --dtype bfloat16 --cap 2052 --text repeats --tokens 6144 --policy "strict,$kept,$read,$kept:recall_lag=2"
  bench --shape pythia-2.8b --cap 2052 --text repeats --tokens 6144 --policy "strict,$read"
}
long() { bench --model "${models%% *}" --text "$first_text" --policy strict --cap 1024 --tokens 1000000; }
precision_of() {
  local shared=(--model "$1" --text "$first_text" --tokens 20000 --cap 512 --policy lazy:compress_every=64 --out "$out/precision")
  run eval "${shared[@]}" --backend fused --dtype float16
  run eval "${shared[@]}" --backend hf --dtype float32 --evaluate blocks
}
blocks_of() {
  local shared=(--model "$1" --text "$first_text" --cap 512 --dtype float32 --policy strict,lazy --out "$out/blocks")
  run eval "${shared[@]}" --tokens 1536 --evaluate steps
  run eval "${shared[@]}" --tokens 1536 --evaluate blocks
  run eval "${shared[@]}" --tokens 20000 --evaluate blocks
}
every_policy() {
  for r in 1 16 32 64 128 256; do printf 'lazy:compress_every=%s,' $r; done
  printf 'max-drop:compress_every=64:max_drop=8,max-drop:compress_every=256:max_drop=32,overlap:compress_every=64:overlap=64,'
  printf 'slack:slack=16:compress_every=64,slack:slack=63:compress_every=256,'
  for scorer in uniform structural uncertainty window-attention accumulated-attention last-query key-norm; do
    printf 'refresh-%s:compress_every=64:refresh=64,' $scorer
  done
  printf 'adaptive-entropy,adaptive-top1'
}
diagnosis_of() {
  for text in $texts; do
    run diagnose --model "$1" --text "$text" --cap 512 --dtype float32 --sample-every 64 --policy "$(every_policy)" \
      --out "$out/diagnosis/$2-$(basename "$text" .json)" --resume
  done
}
recall_of() {
  local policies=full,strict,window-only,lazy:compress_every=64,lazy:compress_every=256,slack:slack=64
  for scorer in uniform window-attention accumulated-attention key-norm; do
    policies+=",refresh-$scorer:compress_every=64:refresh=64"
  done
  run recall --model "$1" --text "$first_text" --cap 512 --passages 12 --distances 0.25,0.5,1,2,4,8,16 --policy "$policies" \
    --out "$out/recall/$2" --resume
}
passages_of() {
  run recall --model "$1" --text "$first_text" --cap 512 --passages 64 --distances 0.5,16,64 --out "$out/passages/$2" --resume \
    --policy strict,strict:recall=lexical,strict:recall=oracle,strict:recall=late-oracle
}
facts_of() {
  run recall --model "$1" --text "$first_text" --cap 512 --facts 75 --distances 0.5,4,16 --out "$out/facts/$2" --resume \
    --policy strict,strict:recall=lexical,strict:recall=oracle
}
streameval_of() {  # twelve rows in one command
  local all=window-only,strict,lazy:compress_every=64 large=recall_bytes=12000000000 chooser archive
  for chooser in lexical late-oracle; do
    for archive in "" :recall_archive=text ":$large"; do all+=",strict:recall=$chooser$archive"; done
  done
  run streameval --model "$1" --cap 512 --backend fused --policy "$all,strict:recall=heads,strict:recall=union,full" \
    --out "$out/streameval/$2" --resume
}
reply_of() {
  run streameval --model "$1" --text "$long_text" --cap 512 --backend fused --reply-tokens 1000000 \
    --policy strict:recall=lexical:recall_archive=text,strict --out "$out/reply/$2" --resume
}
sweeps_of() {
  local named=() text
  for text in $texts; do
    case $text in *wikitext*) named+=(--text "wikitext=$text") ;; *) named+=(--text "pg19=$text") ;; esac
  done
  for file in window_sink compress_every overlap slack adaptive refresh; do
    run matrix "experiments/$file.toml" --model "$1" "${named[@]}" --out "$out/sweeps"
  done
}
cliff_of() {
  run cliff --model "$1" --text "$first_text" --tokens 20000 --caps 0.25,0.5,1,1.25 --compress-every 128,1024 --out "$out/cliff/$2" --resume
}
side_by_side() { "$python" -c 'import xdist' 2>/dev/null && echo "-n $1"; }
tests() { PYTHON=$python make test-gpu ARGS="$(side_by_side 8)" 2>&1 | tee "$out/test-gpu.txt"; }
SANITIZED='triton and (agree or rings or every_way or combined or negative or cursor or risks or frames_and_dtypes or
 beside_a_linear or stays_is and 50- or any_width and 2049 or any_width_and_count and 3-1025 or added_up and 3- or
 float64 and way6 or float64 and sizes4 or schedules and staged or splits and 8-band7 or bands and band11 or
 head_sizes and sizes6 or 520-65-dtype0-1- or 200-38-True-swiglu-1- or 200-520-dtype0-1- or test_activation and dtype0 or
 test_add_norm and 520-True-dtype0 or test_rotate_qkv and dtype0 or choices and sizes5 or own_set and 2-triton or
 keeps_the_queries and sizes5 or angles_of_positions or entries_and_sets and sizes5 or has_received and sizes3 or
 chunk_gives and sizes4 or slots_agree and sink-triton) or norms_of_rows and 1100 or products and 3-200 or
 activations and 48 or inputs_that_stay and 2-256 or against_float64 and 9-72 or twin_draws and narrow or functions_are_those'
sanitizer() {  # every kernel, few shapes; all kernels are compiled first, and each file of tests is a process of its own
  local tool file processes kernels=()
  "$python" -m pytest --collect-only -q -m 'not slow' -k "${SANITIZED//$'\n'/}" tests/kernels >"$out/chosen.txt"
  for file in tests/kernels/test_*.py; do
    [[ $file == *test_config.py || $file == *test_runtime.py ]] && continue
    kernels+=("$file")
    grep -q "^$file:" "$out/chosen.txt" || { echo "no test of $file is chosen by SANITIZED in $0" >&2; return 2; }
  done
  "$python" -m pytest -q $(side_by_side 8) -m 'not slow' -k "${SANITIZED//$'\n'/}" tests/kernels >"$out/compiled.txt" 2>&1
  for tool in memcheck racecheck; do
    processes=()
    for file in "${kernels[@]}"; do
      compute-sanitizer --tool $tool "$python" -m pytest -v -m 'not slow' -k "${SANITIZED//$'\n'/}" "$file" \
        >"$out/$tool-$(basename "$file" .py).txt" 2>&1 &
      processes+=($!)
    done
    wait "${processes[@]}"
  done
  grep -H 'SUMMARY\|passed\|failed' "$out"/memcheck-*.txt "$out"/racecheck-*.txt
}

mkdir -p "$out"
for part in "$@"; do
  case $part in
    precision | blocks | diagnosis | recall | passages | facts | streameval | reply | sweeps | cliff) on_models "${part}_of" ;;
    speed | ladder | shapes | caps | streams | policies | prompts | snapshots | sampling | recall-speed | long | tests | sanitizer) $part ;;
    *) echo "part '$part' is not known; accepted: those in the head of $0" >&2; exit 2 ;;
  esac
  echo "$part: ended with $? after $SECONDS s"
done
