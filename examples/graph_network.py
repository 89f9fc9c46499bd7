"""A graph network: boiling points of 4,900 molecules, from their atoms and bonds.

    torchrun --standalone --nproc-per-node 2 examples/graph_network.py

Those of molecules held out are 13 K off in the mean. The data are the organic compounds of the CRC Handbook, as the
package chemicals has them; rdkit reads their SMILES.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import chemicals
import torch
import torch.nn.functional as F
from gpt import ranks, report
from gpt.ranks import Place, own_rows
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINEConv, global_add_pool
from torch_geometric.utils import from_smiles
from tqdm import tqdm

from pyzero import FusedZeroAdamW

WIDTH, LAYERS, BATCH, LR = 64, 3, 64, 3e-3
ATOM_COLUMNS, BOND_COLUMNS = (119, 9, 11, 12, 9, 5, 8, 2, 2), (22, 6, 2)  # values in each column of from_smiles
MEAN_K, STD_K = 458.0, 89.0  # of the boiling points, in kelvin
QUALITY = "mean error on held-out molecules, K (their mean: 73)"


def load() -> list[Data]:
    """A graph for each molecule: atoms x (num_atoms, 9), bonds both ways, boiling point y (1,) in kelvin."""
    chemicals.Tb("64-17-5")  # the tables are read at first use
    points = chemicals.miscdata.CRC_organic_data.Tb.dropna()
    molecules = []
    for cas, boiling_point in points.items():
        try:
            smiles = chemicals.search_chemical(cas).smiles
        except ValueError:  # one in a hundred has none
            continue
        molecule = from_smiles(smiles)
        if molecule.num_edges:
            molecule.y = torch.tensor([boiling_point], dtype=torch.float32)
            molecules.append(molecule)
    return molecules


class Columns(nn.Module):
    """The sum of a table's row for each column."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, WIDTH) for size in sizes)

    def forward(self, columns: Tensor) -> Tensor:
        return sum(table(column) for table, column in zip(self.tables, columns.T, strict=True))


class GraphNetwork(nn.Module):
    """Atoms hear from their neighbours, a few times over, and are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.atoms = Columns(ATOM_COLUMNS)
        self.bonds = nn.ModuleList(Columns(BOND_COLUMNS) for _ in range(LAYERS))
        self.layers = nn.ModuleList(GINEConv(self.perceptron()) for _ in range(LAYERS))
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def perceptron(self) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, molecules: Any) -> Tensor:
        """(num_molecules,) boiling points, standardised."""
        atoms = self.atoms(molecules.x)
        for layer, bonds in zip(self.layers, self.bonds, strict=True):
            atoms = atoms + layer(atoms, molecules.edge_index, bonds(molecules.edge_attr))
        return self.head(global_add_pool(atoms, molecules.batch) / 8).squeeze(1)


def train(kind: type[Optimizer], molecules: list[Data], epochs: int, place: Place) -> dict[int, float]:
    """The held-out quality by step."""
    torch.manual_seed(0)  # one order of the molecules on all ranks
    model = GraphNetwork().to(place.device)
    optimizer = kind(model.parameters(), lr=LR, weight_decay=0.01)
    rows = (torch.arange(len(molecules)) % 10 > 0).nonzero().squeeze(1)
    order = torch.cat([rows[torch.randperm(len(rows))] for _ in range(epochs)]).split(BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(order), cycle_momentum=False)
    held_out = Batch.from_data_list(molecules[::10]).to(place.device)
    curve = {}
    with tqdm(order, unit="step", desc=kind.__name__, disable=place.rank != 0) as bar:
        for step, batch in enumerate(bar, 1):
            mine, share = own_rows(batch, place)
            graphs = Batch.from_data_list([molecules[i] for i in mine.tolist()]).to(place.device)
            loss = F.smooth_l1_loss(model(graphs), (graphs.y - MEAN_K) / STD_K, beta=0.1) * share
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of the mean over the ranks
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 50 == 0 or step == len(order):
                with torch.no_grad():
                    curve[step] = float((model(held_out) * STD_K + MEAN_K - held_out.y).abs().mean())
                bar.set_postfix(error=f"{curve[step]:.1f} K")
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--no-baseline", action="store_true", help="do not train AdamW as well")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the picture")
    args = parser.parse_args()
    molecules = load()
    with ranks.joined() as place:
        curves = {"FusedZeroAdamW": train(FusedZeroAdamW, molecules, args.epochs, place)}
    if place.rank == 0:
        if not args.no_baseline:
            curves["AdamW"] = train(AdamW, molecules, args.epochs, place.alone())
        for name, curve in curves.items():
            print(f"{name}: held-out error {list(curve.values())[-1]:.1f} K")
        report.plot_qualities(curves, QUALITY, args.out / "graph_network.png")


if __name__ == "__main__":
    main()
