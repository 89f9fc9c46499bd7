"""A recommender: films that critics will like, by DLRM's parts, from 17,000 films of Wikidata.

    torchrun --standalone --nproc-per-node 2 examples/recommender.py
    torchrun --standalone --nproc-per-node 2 examples/recommender.py --sparse

A film that 60% of the critics liked is ranked above one that they did not 79 times of 100, for films held out.
--sparse: the tables have sparse gradients, and torch.optim.SparseAdam takes them. FusedZeroAdamW has the rest.
The data are those of the package bokeh_sampledata (CC0).
"""

from __future__ import annotations

import argparse
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bokeh_sampledata
import torch
import torch.nn.functional as F
from gpt import ranks, report
from gpt.ranks import Place, own_rows
from sparse_grads import average_sparse_grads
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, SparseAdam
from tqdm import tqdm

from pyzero import FusedZeroAdamW

# A film has any number of each of these; words of fewer films than this have no row in a table.
BAGS = {"Genre": 1, "Director": 2, "Writer": 2, "Cast": 2, "Language": 5, "Country": 5, "Production": 3, "Rating": 1}
LONGEST_BAG, WIDTH, DROPPED = 20, 16, 0.3
EPOCHS, BATCH, LR = 3, 256, 2e-3
QUALITY = "AUC on held-out films (a coin: 0.5)"


@dataclass(frozen=True)
class Films:
    """n films. Every tenth is held out, and no table has a row for its sake."""

    titles: list[str]
    dense: Tensor  # (n, 4): year, runtime, whether that is known, size of the cast
    bags: list[Tensor]  # (n, longest) rows of a table, one for each of BAGS; 0 is no word
    table_sizes: list[int]
    liked: Tensor  # (n,) 1.0 where 60% of the critics and more recommended it

    def rows(self, held_out: bool) -> Tensor:
        is_held_out = torch.arange(len(self.titles), device=self.dense.device) % 10 == 0
        return (is_held_out == held_out).nonzero().squeeze(1)


def load(device: torch.device) -> Films:
    columns = ", ".join(f'omdb."{name}"' if name != "Production" else "Production" for name in BAGS)
    query = f"SELECT Title, Year, Runtime, Meter, {columns} FROM omdb JOIN tomatoes USING (ID) WHERE Meter NOT NULL"
    with sqlite3.connect(Path(bokeh_sampledata.__file__).parent / "_data" / "movies.db") as database:
        films = database.execute(f"{query} ORDER BY ID").fetchall()
    titles, years, runtimes, meters, *columns_of_words = zip(*films, strict=True)
    bags, sizes = [], []
    for column, fewest in zip(columns_of_words, BAGS.values(), strict=True):
        words = [[word for word in (cell or "").split(", ") if word][:LONGEST_BAG] for cell in column]
        counts = Counter(word for i, bag in enumerate(words) if i % 10 for word in bag)
        numbers = {word: n for n, word in enumerate((w for w, count in counts.items() if count >= fewest), 1)}
        known = [torch.tensor([numbers[word] for word in bag if word in numbers]) for bag in words]
        bags.append(nn.utils.rnn.pad_sequence([bag.long() for bag in known], batch_first=True))
        sizes.append(len(numbers) + 1)
    runtime = torch.tensor([minutes or 100.0 for minutes in runtimes])
    is_known = torch.tensor([float(minutes is not None) for minutes in runtimes])
    cast = (bags[list(BAGS).index("Cast")] > 0).sum(1)
    dense = torch.stack([(torch.tensor(years) - 1990) / 20, (runtime - 100) / 30, is_known, cast / 10], dim=1)
    liked = (torch.tensor(meters) >= 60).float()
    return Films(list(titles), dense.to(device), [bag.to(device) for bag in bags], sizes, liked.to(device))


class Recommender(nn.Module):
    """Tables and dense columns to vectors, the vectors' products, and a perceptron over all."""

    def __init__(self, films: Films, sparse: bool) -> None:
        super().__init__()
        kind: dict[str, Any] = {"mode": "mean", "padding_idx": 0, "sparse": sparse}
        self.tables = nn.ModuleList(nn.EmbeddingBag(size, WIDTH, **kind) for size in films.table_sizes)
        for table in self.tables:
            table.weight.data.mul_(0.1)
        self.bottom = nn.Sequential(nn.Linear(films.dense.shape[1], 32), nn.ReLU(), nn.Linear(32, WIDTH))
        num = len(self.tables) + 1
        self.top = nn.Sequential(nn.Linear(num * WIDTH + num * (num - 1) // 2, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, films: Films, rows: Tensor) -> Tensor:
        """(rows,) logits of being liked."""
        pooled = [table(bag[rows]) for table, bag in zip(self.tables, films.bags, strict=True)]
        vectors = torch.stack([self.bottom(films.dense[rows]), *map(self.drop, pooled)], dim=1)  # (rows, num, WIDTH)
        above = torch.triu_indices(vectors.shape[1], vectors.shape[1], offset=1)
        products = (vectors @ vectors.mT)[:, above[0], above[1]]
        return self.top(torch.cat([vectors.flatten(1), products], dim=1)).squeeze(1)

    def drop(self, pooled: Tensor) -> Tensor:
        return F.dropout(pooled, DROPPED, self.training)


def optimizers_of(model: Recommender, kind: type[Optimizer], sparse: bool) -> list[Optimizer]:
    """SparseAdam has no weight decay, and its moments of a row stand still in a step without that row."""
    if not sparse:
        return [kind(model.parameters(), lr=LR, weight_decay=0.1)]
    others = [param for name, param in model.named_parameters() if not name.startswith("tables.")]
    return [kind(others, lr=LR, weight_decay=0.1), SparseAdam(list(model.tables.parameters()), lr=LR)]


def train(kind: type[Optimizer], films: Films, sparse: bool, place: Place) -> tuple[dict[int, float], Recommender]:
    """The held-out quality by step, and the model."""
    torch.manual_seed(0)  # the same tables on all ranks: SparseAdam's are nobody's to broadcast
    model = Recommender(films, sparse).to(place.device)
    optimizers = optimizers_of(model, kind, sparse)
    rows = films.rows(held_out=False)
    order = torch.cat([rows[torch.randperm(len(rows)).to(rows.device)] for _ in range(EPOCHS)]).split(BATCH)
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.0, len(order)) for each in optimizers]
    curve = {}
    with tqdm(order, unit="step", desc=kind.__name__, disable=place.rank != 0) as bar:
        for step, batch in enumerate(bar, 1):
            mine, share = own_rows(batch, place)
            loss = F.binary_cross_entropy_with_logits(model(films, mine), films.liked[mine]) * share
            loss.backward()  # FusedZeroAdamW averages the gradients of its own parameters
            if sparse and place.size > 1:
                average_sparse_grads(list(model.tables.parameters()))
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            if step % 10 == 0 or step == len(order):
                curve[step] = auc(model, films)
                bar.set_postfix(auc=f"{curve[step]:.3f}")
    return curve, model


@torch.no_grad()
def scores(model: Recommender, films: Films) -> Tensor:
    model.eval()
    logits = model(films, films.rows(held_out=True))
    model.train()
    return logits


def auc(model: Recommender, films: Films) -> float:
    """How often a liked film is ranked above one that is not."""
    liked = films.liked[films.rows(held_out=True)][scores(model, films).argsort()]
    below = (1 - liked).cumsum(0)
    return float((below * liked).sum() / (liked.sum() * (1 - liked).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparse", action="store_true", help="tables with sparse gradients, by SparseAdam")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the picture")
    args = parser.parse_args()
    with ranks.joined() as place:
        films = load(place.device)
        curve, model = train(FusedZeroAdamW, films, args.sparse, place)
    if place.rank == 0:
        best = films.rows(held_out=True)[scores(model, films).argsort(descending=True)[:5]].tolist()
        print("recommended:", "; ".join(f"{films.titles[i]} ({'liked' if films.liked[i] else 'not'})" for i in best))
        plain, _ = train(AdamW, films, args.sparse, place.alone())
        print(f"AUC: FusedZeroAdamW {curve[max(curve)]:.4f}, AdamW in one process {plain[max(plain)]:.4f}")
        report.plot_qualities({"FusedZeroAdamW": curve, "AdamW": plain}, QUALITY, args.out / "recommender.png")


if __name__ == "__main__":
    main()
