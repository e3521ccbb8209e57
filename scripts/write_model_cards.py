"""Write the cards of the checkpoints that come with the package, from model_cards/NAME.yaml.

python scripts/write_model_cards.py
"""

import argparse
from pathlib import Path

import panfoma_hf
from panfoma_hf.hub import CARD, released_card


FACTS = Path(__file__).resolve().parent.parent / "model_cards"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the cards go; beside each checkpoint if left out")
    arguments = parser.parse_args()
    for facts in sorted(FACTS.glob("*.yaml")):
        checkpoint = panfoma_hf.checkpoint(facts.stem)
        path = (arguments.folder / facts.stem if arguments.folder else checkpoint) / CARD
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(released_card(facts, checkpoint), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
