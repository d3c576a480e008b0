// A click on a column's name sorts the rows by it: numbers by value, texts by letters, empty cells last.
for (const table of document.querySelectorAll("table.rows")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const value = (row) => {
        const text = row.cells[column].textContent.trim();
        return head.classList.contains("n") ? (text === "exact" ? Infinity : parseFloat(text)) : text;
      };
      const isEmpty = (found) => found === "" || Number.isNaN(found);
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([one], [other]) => {
        if (isEmpty(one) || isEmpty(other)) return isEmpty(one) - isEmpty(other);
        return sign * (typeof one === "string" ? one.localeCompare(other, undefined, {numeric: true}) : one < other ? -1 : one > other ? 1 : 0);
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
