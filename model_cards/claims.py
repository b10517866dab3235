"""What the paper finds, as rules over our result tables: a card says of each whether our measurements agree.

To add one: a line in `RULES`. Unusual: a rule is about a direction alone, as the paper's data are private; and only
rules whose table exists are printed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .tables import Cell, Found, Table
from .trace import Trace

OURS = "SAIL"  # how our column begins
AGREES, DISAGREES, WITHIN = "agrees", "**disagrees**", "within the spread"


# Has 100 candidates: at 50 it asks for the better half, which is not what the paper's Recall@50 asks.
FEW_CANDIDATES = "PictureToSound"


@dataclass(frozen=True)
class Rule:
    """That one thing beats another.

    Attributes:
        claim: the paper's finding, without its figures.
        source: section, table or figure of the paper.
        report, table: keys of ours; ``<table>_50`` is taken where it is there, as the paper has Recall@50.
        better, worse: how two names begin: columns, or rows where ``of_rows``.
        where: the name across on which they are compared, or how several begin; all by default.
        of_rows: who is compared stands in rows, what is asked in columns.
    """

    claim: str
    source: str
    report: str
    table: str
    better: str
    worse: str
    where: str = ""
    of_rows: bool = False


def _peers(does: str, source: str, table: str) -> list[Rule]:
    names = {"VLM-style": "the VLM-style one", "dual tower": "the dual tower"}
    claims = [(OURS, "the omni-modal model", "VLM-style"), (OURS, "the omni-modal model", "dual tower")]
    claims.append(("VLM-style", "the VLM-style model", "dual tower"))
    return [
        Rule(f"{who} {does.format(names[worse])}", source, "peers", table, better, worse)
        for better, who, worse in claims
    ]


def _ladder(claim: str, better: str, worse: str, tables: Sequence[str]) -> Iterable[Rule]:
    return [Rule(f"{claim} ({table})", "Fig.9/10", "ladder", table, better, worse) for table in tables]


def _behaviour(claim: str, source: str, table: str, better: str, worse: str, where: str) -> Rule:
    return Rule(claim, source, "cre", table, better, worse, where, of_rows=True)


RULES: tuple[Rule, ...] = (
    *_peers("is above {} on i2i", "Tab.2", "i2i"),
    *_peers("is above {} on q2i", "Tab.3", "q2i"),
    *_peers("tells pairs better than {}", "Tab.3", "pairs"),
    *_ladder("an LLM as fuser helps", "LLM fuser", "text encoder", ("q2i",)),
    *_ladder("bidirectional attention helps", "+ bidirectional", "LLM fuser", ("q2i", "i2i")),
    *_ladder("instructions by task help", "+ instructions", "+ bidirectional", ("q2i",)),
    *_ladder("full fine-tuning is better than LoRA", "+ full fine-tuning", "+ instructions", ("q2i",)),
    *_ladder("more and more diverse data help", "+ more data", "+ full fine-tuning", ("q2i", "i2i")),
    *_ladder("CoSENT helps", "+ CoSENT", "+ more data", ("q2i",)),
    *_ladder("progressive stages help", "+ progressive", "+ CoSENT", ("q2i", "i2i")),
    _behaviour("sequence-to-item raises filtered recall", "§4.3", "sequences", "seq2item", "content", "filtered"),
    _behaviour("sequence-to-item raises vanilla recall", "§4.3", "sequences", "seq2item", "content", "vanilla"),
    _behaviour("ID-to-item raises filtered recall further", "§4.3", "sequences", "id2item", "seq2item", "filtered"),
    _behaviour("ID-to-item raises vanilla recall further", "§4.3", "sequences", "id2item", "seq2item", "vanilla"),
    _behaviour("behaviour raises NMI", "§4.3", "copairs", "id2item", "content", "copairs nmi"),
    _behaviour("behaviour raises Kendall's tau", "§4.3", "copairs", "id2item", "content", "copairs kendall"),
    _behaviour("behaviour raises the overlap of neighbours", "§4.3", "copairs", "id2item", "content", "copairs top_k"),
    _behaviour("behaviour raises bijective accuracy", "§4.3", "copairs", "id2item", "content", "copairs bijective"),
    _behaviour("behaviour raises ID-i2i", "§4.3", "i2i", "id2item", "content", "ID-i2i R@"),
    _behaviour(
        "embeddings and semantic IDs raise the ranking AUC (there online)",
        "§4.3",
        "ranker",
        "chosen, id2item: base+match+sids",
        "chosen, base",
        "AUC",
    ),
    _behaviour(
        "semantic IDs bring more than the dense embedding (there online)",
        "§3.3.5",
        "ranker",
        "chosen, id2item: base+sids",
        "chosen, id2item: base+match",
        "AUC",
    ),
    Rule(
        "CoSENT, mICL, late fusion and patterns add to NCE",
        "§3.3.2",
        "recipe_comparison",
        "recipes",
        "mini-full",
        "mini-plain",
    ),
    Rule(
        "a selected subset improves the base",
        "§3.3.1",
        "progressive",
        "recipes",
        "mini-progressive: near",
        "mini-progressive: all",
    ),
    Rule(
        "mined negatives improve it further",
        "§3.3.1",
        "progressive",
        "recipes",
        "mini-progressive: refined",
        "mini-progressive: near",
    ),
    Rule(
        "progressive stages are better than all in one",
        "§3.3.1",
        "progressive",
        "recipes",
        "mini-progressive: refined",
        "mini",
    ),
)


def pairs_of(rule: Rule, table: Table) -> list[tuple[Cell, Cell]]:
    """The cells that a rule compares: where both are there."""
    across = table.columns if rule.of_rows else list(table.rows)
    down = list(table.rows) if rule.of_rows else table.columns
    better, worse = _named(rule.better, down), _named(rule.worse, down)
    if better is None or worse is None:
        return []
    found = []
    at_50 = table.key.endswith("_50")
    for name in [rule.where] if rule.where in across else across:
        if at_50 and name.startswith(FEW_CANDIDATES):
            continue
        both = [table.rows[who].get(name) if rule.of_rows else table.rows[name].get(who) for who in (better, worse)]
        if name.startswith(rule.where) and both[0] is not None and both[1] is not None:
            found.append((both[0], both[1]))
    return found


def _named(begins: str, names: Sequence[str]) -> str | None:
    """The name itself, else the first one that begins so."""
    return begins if begins in names else next((name for name in names if name.startswith(begins)), None)


def verdict(gains: Sequence[float], *, higher_is_better: bool = True) -> str:
    """Of the gain of each seed: its mean must be more than half the distance of the extremes; one seed has none."""
    mean = statistics.mean(gains) * (1 if higher_is_better else -1)
    if abs(mean) <= (max(gains) - min(gains)) / 2:
        return WITHIN
    return (AGREES if mean > 0 else DISAGREES) + (" (one seed)" if len(gains) == 1 else "")


def claims_table(found: Sequence[Found], trace: Trace) -> str:
    """Markdown: each claim whose table is there: our difference (mean over what is asked, spread) and a verdict."""
    tables = {(one.key, table.key): table for one in found for table in one.tables}
    lines = []
    for rule in RULES:
        table = tables.get((rule.report, f"{rule.table}_50")) or tables.get((rule.report, rule.table))
        pairs = pairs_of(rule, table) if table is not None else []
        if table is None or not pairs:
            continue
        better, minus = [one.at for one, _ in pairs], [other.at for _, other in pairs]
        gain = trace.spread(*better, minus=minus, digits=3, signed=True)
        above = trace.number(*better, minus=minus, how="places above")
        said = verdict(trace.values(*better, minus=minus), higher_is_better=table.higher_is_better)
        rows = f"{above} of {trace.number(*better, how='places')}"
        lines.append(f"| {rule.claim} | {rule.source} | {gain} | {rows} | {said} |")
    head = ["| the paper | where | our difference | above in | verdict |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""
