// Numbers from a text: CSV with commas, semicolons, tabs or blanks between columns, with or without a head.

/** Returns the columns whose every cell is a number, as `{name, values}`. Throws an Error that says what is wrong. */
export function columnsOf(text) {
  const lines = text.split(/\r?\n/).filter((line) => line.trim());
  if (!lines.length) throw new Error("There is nothing in it: give numbers, a row for each time step.");
  const separator = [";", "\t", ","].find((one) => lines[0].includes(one)) ?? /\s+/;
  const cells = lines.map((line) =>
    line
      .trim()
      .split(separator)
      .map((cell) => cell.trim().replace(/^"(.*)"$/, "$1")),
  );
  const number = (cell) => (cell === "" ? NaN : Number(separator === ";" ? cell.replace(",", ".") : cell));
  const headed =
    (cells.length > 1 && cells[0].every((cell) => Number.isNaN(number(cell)))) ||
    (cells.length > 1 &&
      cells[0].some((cell, place) => Number.isNaN(number(cell)) && !Number.isNaN(number(cells[1][place] ?? ""))));
  const rows = headed ? cells.slice(1) : cells;
  const width = rows[0].length;
  const odd = rows.findIndex((row) => row.length !== width);
  if (odd >= 0)
    throw new Error(`Row ${odd + 1} has ${rows[odd].length} columns, the first has ${width}: each must have as many.`);
  const columns = Array.from({ length: width }, (_, place) => ({
    name: headed ? cells[0][place] || `column ${place + 1}` : `column ${place + 1}`,
    values: rows.map((row) => number(row[place])),
  }));
  const numeric = columns.filter(({ values }) => values.every(Number.isFinite));
  if (!numeric.length) {
    const row = columns[0].values.findIndex((value) => !Number.isFinite(value));
    throw new Error(`No column has only numbers: row ${row + 1} begins with ${JSON.stringify(rows[row][0])}.`);
  }
  return numeric;
}
