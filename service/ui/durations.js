// Durations in words.

/** Returns a number of seconds in the largest unit that fits. */
export function duration(seconds) {
  for (const [size, name] of [
    [86400, "day"],
    [3600, "hour"],
    [60, "minute"],
    [1, "second"],
  ]) {
    if (seconds >= size) {
      const count = Number((seconds / size).toPrecision(2));
      return `${count} ${name}${count === 1 ? "" : "s"}`;
    }
  }
  return `${seconds} seconds`;
}

/** Returns how long ago a time was, as the API writes it; the browser's clock may be behind the server's. */
export function age(time) {
  return duration(Math.max(0, Math.floor((Date.now() - Date.parse(time)) / 1000)));
}
