"""Random search, or TPE, for the network under a parameter budget that trains best, on Ray Tune.

    python -m search                              # 200 trials of up to 30 epochs of CIFAR-10
    python -m search demo --num-samples 8 --epochs 4 --name try   # digits, no download
    python -m search --resume search              # continues a search that was interrupted
    python train.py --config checkpoints/search/best.json --epochs 300

space.py has the options, SPACE and the drawing of configurations; trials.py the trials and their
folders; run.py a search from its start to best.json; cluster.py starts Ray, ray_tune.py runs the
trials on it; figures.py draws what was found.
"""
