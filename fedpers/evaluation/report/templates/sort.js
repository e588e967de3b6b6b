for (const button of document.querySelectorAll("table.board thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const place = head.cellIndex, named = place === 0, sorted = head.getAttribute("aria-sort");
    const first = named || head.dataset.order === "1" ? "ascending" : "descending"; // the best first, names from A on
    const up = sorted === first ? first === "descending" : first === "ascending";
    const value = row => row.cells[place].dataset.value;
    const number = row => parseFloat(value(row));
    const rows = [...body.rows].sort((a, b) => {
      if (named) return up ? value(a).localeCompare(value(b)) : value(b).localeCompare(value(a));
      if (isNaN(number(a)) || isNaN(number(b))) return isNaN(number(a)) - isNaN(number(b)); // what is missing comes last
      return up ? number(a) - number(b) : number(b) - number(a);
    });
    body.append(...rows);
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  });
}
