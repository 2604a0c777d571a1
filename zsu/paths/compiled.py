"""What of the search goes over all edges or paths, compiled by numba."""

from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numba import njit

from ..relevance.sums import ONE_PASS

FIRST, MANY = 16, 128  # children of a node: how many are sorted at first, and beyond how many all are


class Chain(NamedTuple):
    """Edges and runs of a `PathGraph`."""

    weight: np.ndarray
    total: np.ndarray
    run_of: np.ndarray
    run_begin: np.ndarray
    run_length: np.ndarray
    run_source: np.ndarray


class Completions(NamedTuple):
    """The best way from each node to the input: products of weight and `scaled` compare the sources of a run without a
    logarithm each.
    """

    best: np.ndarray  # its log probability; -inf: none
    scaled: np.ndarray  # the probability, relative to the best of the layer
    scale: np.ndarray  # log of that best


@ONE_PASS
def normalise(value, run_of, run_begin, run_length, run_source, inputs):
    """In place: edge relevance -> what is walked. Sums over each node's edges: walked, to dead ends, negative."""
    nodes = len(run_of) - 1
    total, dead, negative = np.zeros(nodes), np.zeros(nodes), np.zeros(nodes)
    alive = np.zeros(nodes, value.dtype)
    alive[:inputs] = 1
    for k in range(inputs, nodes):
        walked, ended, below_zero = 0.0, 0.0, 0.0
        for r in range(run_of[k], run_of[k + 1]):
            row = value[run_begin[r] : run_begin[r] + run_length[r]]
            below = alive[run_source[r] : run_source[r] + run_length[r]]
            for m in range(len(row)):
                positive = row[m] if row[m] > 0 else row.dtype.type(0)
                on = positive * below[m]
                walked += on
                ended += positive - on
                below_zero += row[m] - positive
                row[m] = on
        total[k], dead[k], negative[k] = walked, ended, below_zero
        alive[k] = total[k] > 0
    return total, dead, negative


@ONE_PASS
def marginals(chain: Chain) -> tuple[np.ndarray, np.ndarray]:
    """Share of the walks from the top that lead through each node, m(k), and along each edge, m(k) p(j|k)."""
    weight, total, run_of, run_begin, run_length, run_source = chain
    nodes = len(run_of) - 1
    visits = np.zeros(nodes)
    visits[nodes - 1] = 1.0
    flow = np.zeros(len(weight))
    for k in range(nodes - 1, -1, -1):
        if total[k] > 0:
            share = visits[k] / total[k]
            for r in range(run_of[k], run_of[k + 1]):
                row = weight[run_begin[r] : run_begin[r] + run_length[r]]
                along = flow[run_begin[r] : run_begin[r] + run_length[r]]
                below = visits[run_source[r] : run_source[r] + run_length[r]]
                for m in range(len(row)):
                    along[m] = share * row[m]
                    below[m] += along[m]
    return visits, flow


@ONE_PASS
def completions(chain: Chain, first: np.ndarray, closed: np.ndarray, via: int) -> Completions:
    """Log probability of the best way from each node to the input (-inf: none) that keeps out of closed nodes and, from
    above it, leads through the node `via` (-1: no such demand).
    """
    weight, total, run_of, run_begin, run_length, run_source = chain
    nodes = len(run_of) - 1
    best, scaled, scale = np.full(nodes, -np.inf), np.zeros(nodes), np.zeros(nodes)
    for layer in range(len(first)):
        begin, end = first[layer], first[layer + 1] if layer + 1 < len(first) else nodes
        for k in range(begin, end):
            if closed[k]:
                continue
            if layer == 0:
                best[k] = 0.0 if via < 0 or k <= via else -np.inf
                continue
            if total[k] == 0:
                continue
            for r in range(run_of[k], run_of[k + 1]):
                skip = max(0, via - run_source[r]) if k > via else 0
                row = weight[run_begin[r] + skip : run_begin[r] + run_length[r]]
                below = scaled[run_source[r] + skip : run_source[r] + run_length[r]]
                most = 0.0
                for m in range(len(row)):
                    along = row[m] * below[m]
                    most = along if along > most else most
                if most > 0:
                    best[k] = max(best[k], np.log(most) + scale[run_source[r]])
                else:  # nothing there, or too small for a number that is not a logarithm
                    for m in range(len(row)):
                        if row[m] > 0:
                            best[k] = max(best[k], np.log(row[m]) + best[run_source[r] + skip + m])
            best[k] -= np.log(total[k])
        highest = np.max(best[begin:end])
        if highest > -np.inf:
            scale[begin:end] = highest
            scaled[begin:end] = np.exp(best[begin:end] - highest)
    return Completions(best, scaled, scale)


@njit(cache=True, nogil=True)
def through_edges(chain: Chain, best: np.ndarray) -> np.ndarray:
    """Best way down to each edge's target + log p + best way from its source to the input."""
    weight, total, run_of, run_begin, run_length, run_source = chain
    nodes = len(run_of) - 1
    down = np.full(nodes, -np.inf)
    down[nodes - 1] = 0.0
    score = np.full(len(weight), -np.inf)
    for k in range(nodes - 1, -1, -1):
        for r in range(run_of[k], run_of[k + 1]):
            for m in range(run_length[r]):
                edge = weight[run_begin[r] + m]
                if edge > 0:
                    reached = down[k] + np.log(edge / total[k])
                    source = run_source[r] + m
                    down[source] = max(down[source], reached)
                    score[run_begin[r] + m] = reached + best[source]
    return score


@ONE_PASS
def best_children(node, number, chain, completed, via):
    """The `number` best sources of a node, all if that is more than MANY: best completion first (ties: lower number
    first), with log p and log p + best; and whether these are all there are.
    """
    weight, total, run_of, run_begin, run_length, run_source = chain
    best, scaled, scale = completed
    size, reference = 0, -np.inf
    for r in range(run_of[node], run_of[node + 1]):
        size += run_length[r]
        reference = max(reference, scale[run_source[r]])
    size = size if number > MANY else min(number, size)
    child, step, value = np.empty(size, np.int64), np.empty(size), np.empty(size)
    there = 0
    for r in range(run_of[node], run_of[node + 1]):
        unit = np.exp(scale[run_source[r]] - reference)
        for m in range(max(0, via - run_source[r]) if node > via else 0, run_length[r]):
            edge, source = weight[run_begin[r] + m], run_source[r] + m
            if edge > 0 and best[source] > -np.inf:
                along = edge * scaled[source] * unit
                at = min(there, size - 1)
                there += 1
                if there > size and along <= value[at]:
                    continue
                while number <= MANY and at > 0 and value[at - 1] < along:  # the better ones come first
                    child[at], step[at], value[at] = child[at - 1], step[at - 1], value[at - 1]
                    at -= 1
                child[at], step[at], value[at] = source, edge, along
    kept = min(there, size)
    child, step, value = child[:kept], step[:kept], value[:kept]
    if number > MANY:
        order = np.argsort(-value, kind="mergesort")
        child, step = child[order], step[order]
    for i in range(kept):
        step[i] = np.log(step[i] / total[node])
        value[i] = step[i] + best[child[i]]
    return child, step, value, there == kept


@njit(cache=True, nogil=True)
def grow(a, size, fill):
    """The array with that many rows, new ones filled."""
    b = np.full((size, *a.shape[1:]), fill, a.dtype)
    b[: len(a)] = a
    return b


@njit(cache=True, nogil=True)
def search(
    chain: Chain, completed: Completions, via: int, k: int, depth: int, least: float, coverage: float
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (paths, depth) and log probabilities of the best paths from the last node down: at most k, none below
    `least`, no more than carry `coverage` together.
    """
    start = len(chain.run_of) - 2
    # sorted children of the nodes seen so far, one behind the other: begin, number, and whether these are all
    child, step, value, used = np.empty(4096, np.int64), np.empty(4096), np.empty(4096), 0
    begin, count, whole = np.zeros(start + 1, np.int64), np.zeros(start + 1, np.int64), np.zeros(start + 1, np.bool_)
    size = min(k, 1024)
    nodes = np.full((size, depth), -1, np.int32)
    prefix = np.zeros((size, depth))  # log probability from the start to that node
    result = np.empty(size)
    nodes[0, 0] = start
    # an open path: (-score, serial, parent path, position that deviates, rank of the child taken there)
    heap = [(-completed.best[start], 0, 0, 0, 0)]
    worst, crowded = np.inf, 2 * min(k, 2**40) + 1024  # of what may still be needed; when to look again
    serial, found, carried = 1, 0, 0.0
    while found < k and carried < coverage and len(heap) > 0:
        score, _, parent, position, rank = heappop(heap)
        if -score < least:
            break
        if found == len(nodes):
            size = min(k, 2 * found)
            nodes, prefix, result = grow(nodes, size, -1), grow(prefix, size, 0.0), grow(result, size, 0.0)
        nodes[found, : position + 1] = nodes[parent, : position + 1]
        prefix[found, : position + 1] = prefix[parent, : position + 1]
        at = position
        while True:
            node = nodes[found, at]
            if rank + 1 >= count[node] and not whole[node]:
                c, t, s, whole[node] = best_children(node, max(FIRST, 8 * count[node]), chain, completed, via)
                if used + len(c) > len(child):
                    size = 2 * (used + len(c))
                    child, step, value = grow(child, size, 0), grow(step, size, 0.0), grow(value, size, 0.0)
                begin[node], count[node] = used, len(c)
                child[used : used + len(c)], step[used : used + len(c)], value[used : used + len(c)] = c, t, s
                used += len(c)
            if count[node] == 0:  # an input channel
                break
            here = begin[node] + rank
            if rank + 1 < count[node]:
                sibling = -(prefix[found, at] + value[here + 1])
                if sibling < worst and -sibling >= least:
                    heappush(heap, (sibling, serial, found, at, rank + 1))
                    serial += 1
            nodes[found, at + 1] = child[here]
            prefix[found, at + 1] = prefix[found, at] + step[here]
            at += 1
            rank = 0
        result[found] = prefix[found, at]
        carried += np.exp(result[found])
        found += 1
        if found < k and len(heap) > crowded:  # keep the best that are still needed; a sorted list is a heap
            heap.sort()
            heap = heap[: k - found]
            worst = heap[-1][0]
            crowded = 2 * len(heap) + 1024
    return nodes[:found], result[:found]
