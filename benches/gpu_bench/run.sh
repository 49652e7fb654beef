#!/bin/sh
# Measures on this machine's GPU, and leaves report.md here. Arguments: --quick, or nothing.
# Each part prints as it goes; one that fails leaves its rows without a time and stops no other.
cd "$(dirname "$0")" || exit 1
quick=$1
rm -f ./*.json report.md
for group in copy lora_linear attention nf4 elementwise norm dora rope loss optimizer; do
    ./gpu_bench --group "$group" --json "$group.json" $quick || echo "$group: failed"
done
python3 peers.py $quick || echo "peers: failed"
python3 training.py $quick || echo "training: failed"
python3 report.py $quick
