"""The paper's figures and tables, at toy scale or on real data, each with its picture.

    python paper.py                       # all of it with seeds 0, 1, 2; --seeds 0: a third of it
    python paper.py fig4 losses           # some of it
    python paper.py fig7 --model ViT-B-32-quickgelu --pretrained openai --dataset imagenet --data-root DIR
    python paper.py precision             # not of the paper: experiments/crosscheck.py; also: attacks

Writes results/paper.md, a section for each figure, and results/<figure>.png; for another model than the toy,
to results/<model>/. The runs stay in out/paper/<version of the sources>/, and none is made twice."""
from harness import spin_less

if __name__ == "__main__":
    spin_less()             # before PyTorch is imported
    from experiments.runs import main
    main(__doc__)
