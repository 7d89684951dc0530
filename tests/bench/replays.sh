#!/usr/bin/env bash
# replays.sh OUT [JOBS]: every replay whose figures are claimed, JOBS (2) at once; their documents and
# plots go to the folder OUT. Needs TWFS_TRACES and ./run setup. About an hour of CPU; what OUT
# has already is not done again. TWFS_SCRATCH: where warehouses lie meanwhile, by default in memory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
: "${TWFS_TRACES:?names no folder with kv-cache-tester/ and mooncake/}"
OUT=$(mkdir -p "$1" && cd "$1" && pwd)
SCRATCH=${TWFS_SCRATCH:-/dev/shm}
AGENTS=$TWFS_TRACES/kv-cache-tester
CHAT=$TWFS_TRACES/mooncake/conversation_trace.jsonl
mkdir -p "$OUT/parts"
printf '[admission]\nsecond_touch = ["standard"]\n' >"$OUT/parts/second.toml"

# One line a replay: its name, then its options.
jobs() {
    local window seed capacity policy touch half
    for window in 1h 4h 24h; do
        for seed in 1 2 3 4 5; do
            for capacity in 25 50 10 5 1 100; do
                echo "agents-$window-$capacity-$seed $AGENTS --window $window --seeds $seed-$seed" \
                    "--capacity $capacity% --policy reuse"
            done
        done
    done
    for seed in 1 2 3 4 5; do
        for capacity in 25 50 10 5; do
            echo "ends-$capacity-$seed $AGENTS --seeds $seed-$seed --capacity $capacity% --policy reuse --hints ends"
        done
        for half in learn report; do
            echo "half-$half-$seed $AGENTS --seeds $seed-$seed --capacity 10% --capacity 25%" \
                "--policy reuse --half $half"
        done
    done
    for capacity in 1 5 10 25 50 100; do
        echo "lru-$capacity $AGENTS --capacity $capacity% --policy lru"
    done
    echo "chat-all $CHAT --window 0 --capacity 25% --policy reuse"
    echo "chat-second $CHAT --window 0 --capacity 25% --policy reuse --config $OUT/parts/second.toml"
    for policy in reuse lru; do
        for touch in "--touch" "--no-touch --hints none"; do
            echo "front-$policy$(tr -d ' ' <<<"$touch") $AGENTS --front 46.6G $touch" \
                "--policy $policy --capacity 10% --capacity 25%"
        done
    done
}

export OUT SCRATCH
# shellcheck disable=SC2016 # it is the inner shell that is to expand
jobs | xargs -P "${2:-2}" -L 1 bash -c '
    done=$OUT/parts/$0.json
    [ -s "$done" ] || { .venv/bin/twfs replay "$@" --directory "$SCRATCH" --json >"$done.part" &&
        mv "$done.part" "$done"; }'

merge() { .venv/bin/python tests/bench/merge_replays.py "$OUT/$1.json" --plot "$OUT/$1.png" "${@:2}"; }
merge replay-agents "$OUT"/parts/agents-*.json "$OUT"/parts/lru-*.json
merge replay-agents-ends "$OUT"/parts/ends-*.json
for half in learn report; do merge "replay-half-$half" "$OUT"/parts/half-"$half"-*.json; done
for each in chat-all chat-second; do merge "replay-$each" "$OUT/parts/$each.json"; done
for each in "$OUT"/parts/front-*.json; do merge "replay-$(basename "$each" .json)" "$each"; done
