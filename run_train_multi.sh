#!/bin/sh
# Trains on every visible GPU, else in two processes on the CPU. Any flag of main_multi_gpu.py may follow and wins.
#   CFG, DATASET, DATA_PATH, BATCH_SIZE   what to train (default: the embedded handwritten digits)
#   CUDA_VISIBLE_DEVICES, NPROC           where: GPUs, number of processes
#   NNODES, NODE_RANK, MASTER=HOST:PORT   several machines, one call on each
cd "$(dirname "$0")" || exit 1
[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python}
if [ -z "$CFG" ]; then
    echo "CFG is not set: training the embedded digits. ImageNet: CFG=./configs/gmlp_s16_224.yaml DATA_PATH=/dataset/imagenet sh $0"
fi
set -- -cfg="${CFG:-./configs/gmlp_digits.yaml}" ${DATASET:+-dataset="$DATASET"} ${DATA_PATH:+-data_path="$DATA_PATH"} \
    ${BATCH_SIZE:+-batch_size="$BATCH_SIZE"} "$@"
if [ -n "$NNODES" ]; then
    exec "${PYTHON:-python3}" -m paddle.distributed.launch --nnodes "$NNODES" --rank "${NODE_RANK:?set NODE_RANK to 0 .. NNODES-1}" \
        --master "${MASTER:?set MASTER to HOST:PORT of node 0}" ${NPROC:+--nproc_per_node "$NPROC"} --log_dir "${LAUNCH_LOG_DIR:-output/launch}" \
        main_multi_gpu.py "$@"
fi
exec "${PYTHON:-python3}" main_multi_gpu.py "$@"
