// What `GET /metrics` says in JSON, and what happened between two of its readings.

/** One reading of the metrics. Labels that are not asked for are added up. */
export class Reading {
  constructor({ time, metrics }) {
    this.time = time;
    this.metrics = metrics;
  }

  /** Returns the samples of a name whose labels have these values; a function is asked about a value. */
  samples(name, labels = {}) {
    return (this.metrics[name] ?? []).filter((sample) =>
      Object.entries(labels).every(([label, wanted]) =>
        typeof wanted === "function" ? wanted(sample.labels[label]) : sample.labels[label] === wanted,
      ),
    );
  }

  /** Returns the sum of the samples; null if there are none. */
  sum(name, labels) {
    const samples = this.samples(name, labels);
    return samples.length ? samples.reduce((sum, { value }) => sum + value, 0) : null;
  }

  /** Returns a histogram's buckets as `[[upper bound, cumulative count], ...]`. */
  buckets(name, labels) {
    const counts = new Map();
    for (const {
      labels: { le },
      value,
    } of this.samples(`${name}_bucket`, labels)) {
      const bound = le === "+Inf" ? Infinity : Number(le);
      counts.set(bound, (counts.get(bound) ?? 0) + value);
    }
    return [...counts].sort(([one], [other]) => one - other);
  }
}

/** What happened between two readings. */
export class Span {
  constructor(before, after) {
    this.before = before;
    this.after = after;
    this.seconds = after.time - before.time;
  }

  /** Returns a counter's growth; one that went back began anew, with a new process. */
  growth(name, labels) {
    const after = this.after.sum(name, labels) ?? 0;
    const before = this.before.sum(name, labels) ?? 0;
    return after >= before ? after - before : after;
  }

  /** Returns a counter's growth a second. */
  rate(name, labels) {
    return this.growth(name, labels) / this.seconds;
  }

  /** Returns the mean of a histogram's new values; null if there are none. */
  mean(name, labels) {
    const count = this.growth(`${name}_count`, labels);
    return count ? this.growth(`${name}_sum`, labels) / count : null;
  }

  /**
   * Returns a quantile of a histogram's new values, null if there are none. Within a bucket it is interpolated, as
   * Prometheus's `histogram_quantile` does; beyond the last bound it is that bound.
   */
  quantile(share, name, labels) {
    const before = new Map(this.before.buckets(name, labels));
    const after = this.after.buckets(name, labels);
    const anew = after.some(([bound, count]) => count < (before.get(bound) ?? 0));
    const counts = after.map(([bound, count]) => [bound, count - (anew ? 0 : (before.get(bound) ?? 0))]);
    const total = counts.at(-1)?.[1];
    if (!total) return null;
    const rank = share * total;
    let [low, below] = [0, 0];
    for (const [bound, count] of counts) {
      if (count >= rank) return bound === Infinity ? low : low + ((bound - low) * (rank - below)) / (count - below);
      [low, below] = [bound, count];
    }
    return low;
  }
}
